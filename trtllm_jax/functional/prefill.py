"""The prompts of a generation, computed at once over a paged cache that is made for it."""

from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.table import expand
from trtllm_jax.functional.model import Model
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.cache_group import PageArray
from trtllm_jax.nn.layers import activation_dtype
from trtllm_jax.nn.model import Caches

PAGE_SIZE = 32
NO_TOKEN = -1


def prefill(
    model: Model, params: Any, prompts: jax.Array, lengths: jax.Array, new: int, plain: bool
) -> tuple[jax.Array, Caches, jax.Array]:
    """The residual stream [b, embed] of each prompt's last token, the caches, and every row's pages [b, p].

    Padding is computed like tokens, from embeddings of zeros, which are finite whatever the weights hold: none sees it,
    and its keys and values are overwritten by what is generated.
    """
    rows, width = prompts.shape
    pages = -(-(width + new) // PAGE_SIZE)
    table = 1 + jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
    row = jnp.repeat(jnp.arange(rows), width)
    positions = jnp.tile(jnp.arange(width, dtype=jnp.int32), rows)
    batch = Batch(
        tokens=jnp.where(positions < lengths[row], prompts.reshape(-1).astype(jnp.int32), NO_TOKEN),
        positions=positions,
        page=table[row, positions // PAGE_SIZE],
        offset=positions % PAGE_SIZE,
        rope_lengths=jnp.maximum(lengths[row], positions + 1),
        page_table=table,
        lengths=jnp.full(rows, width, jnp.int32),
        starts=width * jnp.arange(rows + 1, dtype=jnp.int32),
        plain=plain,
    )
    x, caches = model.hidden(params, batch, _empty_caches(model, params, 1 + rows * pages))
    return x.reshape(rows, width, -1)[jnp.arange(rows), jnp.maximum(lengths - 1, 0)], caches, table


def _empty_caches(model: Model, params: Any, pages: int) -> Caches:
    """A cache a layer, for the key-value heads that this device holds, padding included."""
    dtype = activation_dtype(params["embed"].dtype)
    heads = _extent_in(params, model, "kv_heads")

    def empty(array: PageArray) -> jax.Array:
        return jnp.zeros((pages, *array.shape), array.dtype or dtype)

    cache_of = {
        layer: group.cache.resized({"kv_heads": heads}) for group in model.cache_groups for layer in group.layers
    }
    of_page = tuple(cache_of[layer].page(PAGE_SIZE) for layer in sorted(cache_of))
    caches: Caches = jax.tree.map(empty, of_page, is_leaf=lambda leaf: isinstance(leaf, PageArray))
    return caches


def _extent_in(params: Any, model: Model, axis: str) -> int:
    """The extent that a logical axis has in the weights."""
    rows = expand(model.module.table(model.config), model.config.num_layers)
    row = next(row for row in rows if axis in row.axis_names)
    leaf = params
    for name in row.path.split("."):
        leaf = leaf[int(name) if name.isdigit() else name]
    extent: int = leaf.shape[row.axis_names.index(axis)]
    return extent
