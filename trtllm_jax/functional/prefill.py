"""Prefill of a generation: all prompts in one batch, with a paged KV cache allocated for it."""

from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.table import expand, leaf_of
from trtllm_jax.functional.model import Model
from trtllm_jax.nn.batch import Batch, Caches, RaggedRows
from trtllm_jax.nn.cache_group import LayerCache, PageArray
from trtllm_jax.nn.dtypes import activation_dtype

PAGE_SIZE = 32
NO_TOKEN = -1


def prefill(
    model: Model, params: Any, prompts: jax.Array, lengths: jax.Array, new: int
) -> tuple[jax.Array, Caches, jax.Array]:
    """The residual stream [b, embed] of each prompt's last token, the caches, and the page table, int32 [b, p].

    `prompts` are [b, s], `lengths` [b], and `new` tokens a row are reserved. Padding is computed too, from embeddings
    of zeros. No token attends to it, and generated tokens overwrite its keys and values.
    """
    rows, width = prompts.shape
    pages = -(-(width + new) // PAGE_SIZE)
    table = 1 + jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
    starts = width * jnp.arange(rows + 1, dtype=jnp.int32)
    ragged = RaggedRows.of(rows * width, starts, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool))
    real = jnp.arange(width) < lengths[:, None]
    tokens = jnp.where(real, prompts.astype(jnp.int32), NO_TOKEN).reshape(-1)
    tables = (table,) * len(model.cache_groups)
    batch = Batch.of_ragged_rows(tokens, ragged, tables, lengths, PAGE_SIZE, execution=model.execution)
    x, caches = model.hidden(params, batch, _empty_caches(model, params, 1 + rows * pages))
    return x.reshape(rows, width, -1)[jnp.arange(rows), jnp.maximum(lengths - 1, 0)], caches, table


def _empty_caches(model: Model, params: Any, pages: int) -> Caches:
    """The cache of each layer that has one, for the key-value heads in `params`, including padded ones."""
    dtype = activation_dtype(model.weight_dtype(params), model.platform)

    def empty(array: PageArray) -> jax.Array:
        return jnp.zeros((pages, *array.shape), array.dtype or dtype)

    def resized(cache: LayerCache) -> LayerCache:
        return cache.resized({axis: _extent_in(params, model, axis) for axis in cache.sizes})

    cache_of = {layer: resized(group.cache) for group in model.cache_groups for layer in group.layers}
    of_page = tuple(cache_of[layer].page(PAGE_SIZE) for layer in sorted(cache_of))
    caches: Caches = jax.tree.map(empty, of_page, is_leaf=lambda leaf: isinstance(leaf, PageArray))
    return caches


def _extent_in(params: Any, model: Model, axis: str) -> int:
    """The extent of a logical axis in `params`: inside a `shard_map`, that of this device's part."""
    rows = expand(model.module.table(model.config), model.config.num_layers)
    row = next(row for row in rows if axis in row.axis_names)
    extent: int = leaf_of(params, row.path).shape[row.axis_names.index(axis)]
    return extent
