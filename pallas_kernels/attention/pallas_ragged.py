"""Attention of a batch of prompt chunks and decoding rows, as Pallas kernels on Triton.

One kernel normalises and rotates the new keys and writes them and their values to their pages, the other computes
attention (FlashAttention-2, Dao 2023, arXiv:2307.08691). A program of the second handles a tile, which is consecutive
tokens of one row with all query heads of a key-value head, and loops over the row's pages.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention import mosaic_hopper
from pallas_kernels.attention.blocks import (
    Heads,
    Ref,
    add_keys,
    cache_rows,
    load_ready,
    load_rows,
    store_rows,
    value_step,
    whole,
)
from pallas_kernels.attention.head_norms import HeadNorms
from pallas_kernels.attention.locations import PageLocations
from pallas_kernels.attention.masks import LOG2_E, MASKED, Scoring
from pallas_kernels.attention.rotary import Rotation, rotate
from pallas_kernels.attention.softmax import RunningSoftmax
from pallas_kernels.attention.tuned import RaggedConfig
from pallas_kernels.norm import Norm, normalise

WRITTEN_TOKENS = 32
"""How many tokens one program of the writing kernel handles."""


def ragged_attention(
    qkv: jax.Array,
    cache: jax.Array,
    locations: PageLocations,
    *,
    scoring: Scoring,
    norms: HeadNorms | None,
    rotation: Rotation | None,
    sinks: jax.Array | None,
    slopes: jax.Array | None,
    config: RaggedConfig | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`append_and_attend` of rows of any number of tokens: the result [t, h, g, d] and the cache.

    Without a `config` the kernel for Hopper computes attention; `mosaic_hopper.takes` must hold.
    """
    assert locations.starts is not None
    tokens, kv, planes, dim = qkv.shape
    heads = Heads(kv, planes - 2, dim, cache.shape[3])
    matrix = qkv.reshape(-1, dim)
    written = _write(matrix, cache.reshape(-1, dim), locations, norms, rotation, heads, interpret)

    # The padding at the end becomes one more row, whose length is 0.
    starts, lengths = jnp.append(locations.starts, tokens), jnp.append(locations.lengths, 0)
    if config is None:
        padded = replace(locations, starts=starts, lengths=lengths)
        tiles = _tiles(starts, tokens, mosaic_hopper.tile_tokens(heads.group))
        cache = written.reshape(cache.shape)
        queries = qkv[:, :, : heads.group]
        queries = queries if norms is None else normalise(queries, norms.queries, "xla")
        queries = queries if rotation is None else rotate(queries, rotation)
        return mosaic_hopper.attend(queries, cache, padded, *tiles, scoring=scoring), cache
    row_of_tile, first_of_tile = _tiles(starts, tokens, config.tile_tokens)
    own = tuple(each if each is None else each.reshape(-1).astype(jnp.float32) for each in (sinks, slopes))
    inputs = (matrix, written, locations.page_table, lengths, starts, row_of_tile, first_of_tile, norms, rotation, *own)
    out = jax.ShapeDtypeStruct((tokens * kv * heads.group, dim), qkv.dtype)
    attended = pl.pallas_call(
        partial(_kernel, heads=heads, scoring=scoring, config=config),
        grid=(kv, row_of_tile.shape[0]),
        in_specs=whole(inputs),
        out_specs=whole(out),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="ragged_attention",
    )(*inputs)
    return attended.reshape(tokens, kv, heads.group, dim), written.reshape(cache.shape)


def _write(
    qkv: jax.Array,
    cache: jax.Array,
    locations: PageLocations,
    norms: HeadNorms | None,
    rotation: Rotation | None,
    heads: Heads,
    interpret: bool,
) -> jax.Array:
    """The cache with the normalised and rotated key and the value of every token, except tokens of page 0."""
    inputs = (qkv, cache, locations.page, locations.offset, None if norms is None else norms.keys, rotation)
    return pl.pallas_call(
        partial(_write_kernel, heads=heads),
        grid=(heads.kv, pl.cdiv(locations.page.shape[0], WRITTEN_TOKENS)),
        in_specs=whole(inputs),
        out_specs=whole(cache),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="write_keys_and_values",
    )(*inputs)


def _write_kernel(
    qkv_ref: Ref,
    _: Ref,
    page_ref: Ref,
    offset_ref: Ref,
    norm_ref: Norm | None,
    rotation_ref: Rotation | None,
    cache_ref: Ref,
    *,
    heads: Heads,
) -> None:
    """The kernel's program for one head of WRITTEN_TOKENS tokens."""
    head, part = pl.program_id(0), pl.program_id(1)
    token = part * WRITTEN_TOKENS + jnp.arange(WRITTEN_TOKENS)
    known = token < page_ref.shape[0]
    page = plgpu.load(page_ref.at[token], mask=known, other=0)
    offset = plgpu.load(offset_ref.at[token], mask=known, other=0)
    kept = known & (page > 0)
    plane = (token * heads.kv + head) * (heads.group + 2) + heads.group
    key = load_ready(qkv_ref, norm_ref, rotation_ref, heads, plane, token, kept)
    value = load_rows(qkv_ref, plane + 1, kept, 0, heads.dim, heads.padded_dim)
    rows = cache_rows(page, heads, head, offset)
    half = heads.dim // 2
    store_rows(cache_ref, rows, kept, 0, half, key.first)
    store_rows(cache_ref, rows, kept, half, half, key.second)
    store_rows(cache_ref, rows + value_step(heads), kept, 0, heads.dim, value)


def _tiles(starts: jax.Array, tokens: int, tile_tokens: int) -> tuple[jax.Array, jax.Array]:
    """The row (-1 for none) and the first token of every tile, in reverse order of tokens.

    The last tile of a row attends to the most keys; since it starts first, it does not run alone at the end.
    """
    rows = starts.shape[0] - 1
    ends = jnp.cumsum(-(-(starts[1:] - starts[:-1]) // tile_tokens))
    most = min(tokens, rows + tokens // tile_tokens)
    tile = jnp.arange(most - 1, -1, -1, dtype=jnp.int32)
    row = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    inside = jnp.minimum(row, rows - 1)
    before = jnp.where(inside > 0, ends[inside - 1], 0)
    first = starts[inside] + (tile - before) * tile_tokens
    return jnp.where(row < rows, row, -1), first.astype(jnp.int32)


def _kernel(
    qkv_ref: Ref,
    cache_ref: Ref,
    page_table_ref: Ref,
    lengths_ref: Ref,
    starts_ref: Ref,
    row_of_tile_ref: Ref,
    first_of_tile_ref: Ref,
    norms_ref: HeadNorms | None,
    rotation_ref: Rotation | None,
    sinks_ref: Ref | None,
    slopes_ref: Ref | None,
    out_ref: Ref,
    *,
    heads: Heads,
    scoring: Scoring,
    config: RaggedConfig,
) -> None:
    """The kernel's program for one tile and one key-value head."""
    head, tile = pl.program_id(0), pl.program_id(1)
    row = plgpu.load(row_of_tile_ref.at[tile])

    @pl.when(row >= 0)
    def _attend() -> None:
        first = plgpu.load(first_of_tile_ref.at[tile])
        end_token = plgpu.load(starts_ref.at[row + 1])
        length = plgpu.load(lengths_ref.at[row])
        position = length - end_token + first
        place = jnp.arange(config.tile_tokens * heads.padded_group)
        member = place % heads.padded_group
        token = first + place // heads.padded_group
        real = (token < end_token) & (member < heads.group)
        plane = (token * heads.kv + head) * (heads.group + 2) + member
        norm_ref = None if norms_ref is None else norms_ref.queries
        q = load_ready(qkv_ref, norm_ref, rotation_ref, heads, plane, token, real)
        positions = position + place // heads.padded_group
        slopes = None
        if slopes_ref is not None:
            slopes = plgpu.load(slopes_ref.at[head * heads.group + member], mask=member < heads.group, other=0) * LOG2_E
        # A row of length 0 attends to nothing, and its result is 0.
        last = jnp.minimum(position + jnp.minimum(config.tile_tokens, end_token - first), length)

        def add_block(masked: bool) -> Callable[[Any, RunningSoftmax], RunningSoftmax]:
            return lambda index, running: add_keys(
                running, q, positions, cache_ref, page_table_ref, heads, scoring,
                row=row, head=head, first=index * config.block, end=last, block=config.block, masked=masked,
                slopes=slopes,
            )  # fmt: skip

        # Without a limit, all of the tile attends to all of any block that ends before the tile's first position.
        begin = jnp.maximum(scoring.first_visible(position), 0) // config.block
        whole = jnp.clip(position + 1, 0, length) // config.block
        unmasked = begin if scoring.is_limited else whole
        running = RunningSoftmax.empty(place.shape, heads.padded_dim, jnp.exp2)
        running = lax.fori_loop(begin, unmasked, add_block(masked=False), running)
        running = lax.fori_loop(unmasked, pl.cdiv(last, config.block), add_block(masked=True), running)
        if sinks_ref is not None:
            sinks = plgpu.load(sinks_ref.at[head * heads.group + member], mask=member < heads.group, other=MASKED)
            running = running.add_sinks(sinks * LOG2_E)
        answer = (token * heads.kv + head) * heads.group + member
        store_rows(out_ref, answer, real, 0, heads.dim, running.result())
