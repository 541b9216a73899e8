"""Decode attention as a Pallas kernel on Triton: one new token a row, rotated, written to its page and attended to.

Split-KV (Dao et al. 2023, "Flash-Decoding"): several programs share a row's context where there are few rows; what
each found is combined by a second kernel. How many share it is fixed by the shape, how much each takes by the row's
length, so that short contexts are read by one.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.blocks import (
    MIN_DOT,
    Halves,
    Heads,
    Ref,
    add_keys,
    cache_rows,
    load_rotated,
    load_rows,
    store_rows,
    value_step,
    whole,
)
from pallas_kernels.attention.locations import PageLocations
from pallas_kernels.attention.masks import LOG2_E, MASKED, Scoring
from pallas_kernels.attention.rotary import Rotation
from pallas_kernels.attention.softmax import RunningSoftmax
from pallas_kernels.attention.tuned import DecodeConfig


def decode_attention(
    qkv: jax.Array,
    cache: jax.Array,
    locations: PageLocations,
    *,
    scoring: Scoring,
    rotation: Rotation | None,
    sinks: jax.Array | None,
    config: DecodeConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`append_and_attend` where every row owns one token: the result [r, h, g, d] and the cache."""
    rows, kv, planes, dim = qkv.shape
    lengths = locations.lengths
    heads = Heads(kv, planes - 2, dim, cache.shape[3])
    splits = config.splits
    matrix = cache.reshape(-1, dim)
    if sinks is not None:
        sinks = sinks.reshape(-1).astype(jnp.float32)
    inputs = (qkv.reshape(-1, dim), matrix, locations.page_table, lengths, rotation, sinks)
    out_shape: list[jax.ShapeDtypeStruct] = [jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)]
    if splits == 1:
        out_shape.append(jax.ShapeDtypeStruct((rows * kv * heads.group, dim), qkv.dtype))
    else:
        partials = rows * kv * splits * heads.group
        out_shape += [
            jax.ShapeDtypeStruct((partials, dim), jnp.float32),
            *[jax.ShapeDtypeStruct((partials,), jnp.float32)] * 2,
        ]
    written, *results = pl.pallas_call(
        partial(_kernel, heads=heads, scoring=scoring, config=config),
        grid=(kv, rows, splits),
        in_specs=whole(inputs),
        out_specs=whole(out_shape),
        out_shape=out_shape,
        input_output_aliases={1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(*inputs)
    if splits > 1:
        results = [_combine(results, lengths, sinks, heads, scoring, config, qkv.dtype, interpret)]
    return results[0].reshape(rows, kv, heads.group, dim), written.reshape(cache.shape)


def _share(length: jax.Array, scoring: Scoring, config: DecodeConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a row's context begins, how much of it a split reads, and how many splits have something to read.

    The newest token, whose key is not in the cache yet, is not counted: the last split adds it.
    """
    newest = length - 1
    begin = scoring.first_visible(newest) // config.block * config.block
    cached = newest - begin
    fair = pl.cdiv(pl.cdiv(cached, config.splits), config.block) * config.block
    share = jnp.maximum(fair, config.min_share)
    return begin, share, jnp.maximum(pl.cdiv(cached, share), 1)


class _Newest(NamedTuple):
    """What a row's newest token brings to one head: its rotated queries [n, dim] and key [1, dim], its value [1, dim].

    The value is padded; `row` [1] is 0, which makes a list of one row of a row's number.
    """

    queries: Halves
    key: Halves
    value: jax.Array
    row: jax.Array

    @classmethod
    def load(
        cls,
        qkv_ref: Ref,
        rotation_ref: Rotation | None,
        heads: Heads,
        row: jax.Array,
        head: jax.Array,
        place: jax.Array,
        real: jax.Array,
    ) -> "_Newest":
        """Of the query heads at `place` [n] that are `real` [n]."""
        plane = (row * heads.kv + head) * (heads.group + 2)
        rows, tokens = plane + place, jnp.broadcast_to(row, place.shape)
        queries = load_rotated(qkv_ref, rotation_ref, heads, rows, tokens, real)
        one = jnp.arange(1)
        key_plane = plane + heads.group + one
        key = load_rotated(qkv_ref, rotation_ref, heads, key_plane, row + one, None)
        value = load_rows(qkv_ref, key_plane + 1, None, 0, heads.dim, heads.padded_dim)
        return cls(queries, key, value, one)

    def write(self, cache_ref: Ref, heads: Heads, row: jax.Array) -> None:
        """Put key and value into the cache, the key at `row`."""
        there, half = row + self.row, heads.dim // 2
        store_rows(cache_ref, there, None, 0, half, self.key.first)
        store_rows(cache_ref, there, None, half, half, self.key.second)
        store_rows(cache_ref, there + value_step(heads), None, 0, heads.dim, self.value)

    def add_to(self, running: RunningSoftmax, scoring: Scoring, kept: jnp.dtype) -> RunningSoftmax:
        """The softmax with what later steps will read: the key and the value as the cache keeps them."""
        key = Halves(*(part.astype(kept).astype(jnp.float32) for part in self.key))
        products = jnp.sum(self.queries.first.astype(jnp.float32) * key.first, axis=1)
        products += jnp.sum(self.queries.second.astype(jnp.float32) * key.second, axis=1)
        return running.add_one(scoring.log2_scores(products), self.value.astype(kept).reshape(-1))


def _kernel(
    qkv_ref: Ref,
    cache_ref: Ref,
    page_table_ref: Ref,
    lengths_ref: Ref,
    rotation_ref: Rotation | None,
    sinks_ref: Ref | None,
    written_ref: Ref,
    *out_refs: Ref,
    heads: Heads,
    scoring: Scoring,
    config: DecodeConfig,
) -> None:
    """One head of one row, one split of its context."""
    head, row, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    place = jnp.arange(max(MIN_DOT, heads.padded_group))
    real = place < heads.group
    answer = (row * heads.kv + head) * heads.group + place
    # All that can be read without knowing the length is read at once: each wait is long beside a short context.
    length = plgpu.load(lengths_ref.at[row])
    newest = _Newest.load(qkv_ref, rotation_ref, heads, row, head, place, real)
    begin, share, active = _share(length, scoring, config)

    if config.splits == 1:

        @pl.when(length == 0)
        def _leave_zeros() -> None:
            zeros = jnp.zeros((*place.shape, heads.padded_dim), jnp.float32)
            store_rows(out_refs[0], answer, real, 0, heads.dim, zeros)

    @pl.when((length > 0) & (split < active))
    def _attend() -> None:
        last = length - 1
        positions = jnp.broadcast_to(last, place.shape)
        first = begin + split * share
        end = jnp.minimum(first + share, last)

        def add_block(index: Any, running: RunningSoftmax) -> RunningSoftmax:
            return add_keys(
                running, newest.queries, positions, cache_ref, page_table_ref, heads, scoring,
                row=row, head=head, first=first + index * config.block, end=end, block=config.block, masked=True,
            )  # fmt: skip

        page = plgpu.load(page_table_ref.at[row, last // heads.page_size])
        blocks = jnp.maximum(pl.cdiv(end - first, config.block), 0)
        empty = RunningSoftmax.empty(place.shape, heads.padded_dim, jnp.exp2)
        running = lax.fori_loop(0, blocks, add_block, empty)

        def add_newest(running: RunningSoftmax) -> RunningSoftmax:
            newest.write(written_ref, heads, cache_rows(page, heads, head, last % heads.page_size))
            return newest.add_to(running, scoring, written_ref.dtype)

        running = lax.cond(split == active - 1, add_newest, lambda running: running, running)
        if config.splits == 1:
            if sinks_ref is not None:
                sinks = plgpu.load(sinks_ref.at[head * heads.group + place], mask=real, other=MASKED)
                running = running.add_sinks(sinks * LOG2_E)
            store_rows(out_refs[0], answer, real, 0, heads.dim, running.result())
        else:
            part = ((row * heads.kv + head) * config.splits + split) * heads.group + place
            _store_part(out_refs, part, real, heads, running)


def _store_part(
    out_refs: tuple[Ref, ...], rows: jax.Array, real: jax.Array, heads: Heads, running: RunningSoftmax
) -> None:
    """Leave a split's softmax to `_combine`."""
    weighted_ref, maximum_ref, total_ref = out_refs
    store_rows(weighted_ref, rows, real, 0, heads.dim, running.weighted)
    plgpu.store(maximum_ref.at[rows], running.maximum, mask=real)
    plgpu.store(total_ref.at[rows], running.total, mask=real)


def _combine(
    partials: list[jax.Array],
    lengths: jax.Array,
    sinks: jax.Array | None,
    heads: Heads,
    scoring: Scoring,
    config: DecodeConfig,
    dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """The softmax over all splits of each row and head: [rows * kv * group, dim]."""
    weighted, maximum, total = partials
    rows = lengths.shape[0]
    out = jax.ShapeDtypeStruct((rows * heads.kv * heads.group, heads.dim), dtype)
    inputs = (weighted, maximum, total, lengths, sinks)
    return pl.pallas_call(
        partial(_combine_kernel, heads=heads, scoring=scoring, config=config),
        grid=(heads.kv * heads.group, rows),
        in_specs=whole(inputs),
        out_specs=whole(out),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="combine_splits",
    )(*inputs)


def _combine_kernel(
    weighted_ref: Ref,
    maximum_ref: Ref,
    total_ref: Ref,
    lengths_ref: Ref,
    sinks_ref: Ref | None,
    out_ref: Ref,
    heads: Heads,
    scoring: Scoring,
    config: DecodeConfig,
) -> None:
    """One query head of one row."""
    query_head, row = pl.program_id(0), pl.program_id(1)
    length = plgpu.load(lengths_ref.at[row])
    head, member = query_head // heads.group, query_head % heads.group
    _, _, active = _share(length, scoring, config)
    split = jnp.arange(pl.next_power_of_2(config.splits))
    there = (split < active) & (length > 0)
    answer = ((row * heads.kv + head) * config.splits + split) * heads.group + member
    maximum = plgpu.load(maximum_ref.at[answer], mask=there, other=MASKED)
    sink = MASKED if sinks_ref is None else plgpu.load(sinks_ref.at[query_head]) * LOG2_E
    best = jnp.maximum(jnp.max(maximum, axis=0), sink)
    factor = jnp.exp2(maximum - best)
    total = jnp.sum(plgpu.load(total_ref.at[answer], mask=there, other=0) * factor, axis=0)
    if sinks_ref is not None:
        total += jnp.exp2(sink - best)
    weighted = load_rows(weighted_ref, answer, there, 0, heads.dim, heads.padded_dim)
    mean = jnp.sum(weighted * factor[:, None], axis=0) / jnp.where(total > 0, total, 1.0)
    one = jnp.arange(1)
    store_rows(out_ref, row * heads.kv * heads.group + query_head + one, None, 0, heads.dim, mean[None, :])
