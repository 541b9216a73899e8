"""Decode attention as a Pallas kernel on Triton, which also writes a row's new keys to their pages.

A row has one new token, or a fixed small number of them, as verifying proposed tokens needs.

It is Flash-Decoding (Dao et al. 2023): where there are few rows, several programs divide a row's context among them
(split-KV), and a second kernel combines their results. The number of programs follows from the shapes, and the share of
each from the row's length, so that a short context is read by one program.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.blocks import (
    MIN_DOT,
    Halves,
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
from pallas_kernels.attention.rotary import Rotation
from pallas_kernels.attention.softmax import RunningSoftmax
from pallas_kernels.attention.tuned import DecodeConfig


def decode_attention(
    qkv: Float[Array, "t h qkv d"],
    cache: Float[Array, "pages 2 h page_size d"],
    locations: PageLocations,
    *,
    scoring: Scoring,
    norms: HeadNorms | None,
    rotation: Rotation | None,
    sinks: Float[Array, "h g"] | None,
    slopes: Float[Array, "h g"] | None,
    config: DecodeConfig,
    interpret: bool = False,
) -> tuple[Float[Array, "t h g d"], Float[Array, "pages 2 h page_size d"]]:
    """`append_and_attend` where every row has equally many new tokens."""
    tokens, kv, planes, dim = qkv.shape
    lengths = locations.lengths
    rows = lengths.shape[0]
    heads = Heads(kv, planes - 2, dim, cache.shape[3])
    tile = _Tile(tokens // rows, heads)
    splits = config.splits
    matrix = cache.reshape(-1, dim)
    sinks, slopes = (each if each is None else each.reshape(-1).astype(jnp.float32) for each in (sinks, slopes))
    # The page of a single new token follows from its row's length; of several tokens, the last may have no page.
    pages = None if tile.tokens == 1 else locations.page
    inputs = (qkv.reshape(-1, dim), matrix, locations.page_table, lengths, pages, norms, rotation, sinks, slopes)
    out_shape: list[jax.ShapeDtypeStruct] = [jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)]
    if splits == 1:
        out_shape.append(jax.ShapeDtypeStruct((tokens * kv * heads.group, dim), qkv.dtype))
    else:
        partials = tokens * kv * splits * heads.group
        out_shape += [
            jax.ShapeDtypeStruct((partials, dim), jnp.float32),
            *[jax.ShapeDtypeStruct((partials,), jnp.float32)] * 2,
        ]
    written, *results = pl.pallas_call(
        partial(_kernel, tile=tile, scoring=scoring, config=config),
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
        results = [_combine(results, lengths, sinks, tile, scoring, config, qkv.dtype, interpret)]
    return results[0].reshape(tokens, kv, heads.group, dim), written.reshape(cache.shape)


@dataclass(frozen=True)
class _Tile:
    """The queries of one program: all query heads of a key-value head for every new token of a row.

    Attributes:
        tokens: the number of new tokens of a row.
        heads: the sizes of the layer's attention.
    """

    tokens: int
    heads: Heads

    @property
    def place(self) -> jax.Array:
        """The indices [n] of the tile's queries, some of which are padding."""
        return jnp.arange(max(MIN_DOT, pl.next_power_of_2(self.tokens) * self.heads.padded_group))

    def member(self, place: jax.Array) -> jax.Array:
        """The query head, within its key-value head, of a query of the tile."""
        return place if self.tokens == 1 else place % self.heads.padded_group

    def token(self, place: jax.Array) -> jax.Array | int:
        """The new token, counted from the row's first, of a query of the tile."""
        return 0 if self.tokens == 1 else place // self.heads.padded_group

    def is_real(self, place: jax.Array) -> jax.Array:
        """Whether a query of the tile is not padding."""
        in_group = self.member(place) < self.heads.group
        return in_group if self.tokens == 1 else in_group & (self.token(place) < self.tokens)

    def row_of(self, token: jax.Array) -> jax.Array:
        """The row of a token of the batch."""
        return token if self.tokens == 1 else token // self.tokens

    def in_batch(self, row: jax.Array, token: jax.Array | int) -> jax.Array:
        """The token of the batch that is the given new token of a row."""
        return row if self.tokens == 1 else row * self.tokens + token

    def plane(self, row: jax.Array, head: jax.Array, token: jax.Array | int) -> jax.Array:
        """The row of a new token's first query head in the matrix of projections."""
        return (self.in_batch(row, token) * self.heads.kv + head) * (self.heads.group + 2)

    def answer(self, row: jax.Array, head: jax.Array, place: jax.Array) -> jax.Array:
        """The row of a query's result in the matrix of results."""
        token = self.in_batch(row, self.token(place))
        return (token * self.heads.kv + head) * self.heads.group + self.member(place)

    def partial(self, row: jax.Array, head: jax.Array, split: jax.Array, splits: int, place: jax.Array) -> jax.Array:
        """The row of a split's partial result for a query in the matrix of partial results."""
        first = ((row * self.heads.kv + head) * splits + split) * (self.tokens * self.heads.group)
        if self.tokens == 1:
            return first + place
        return first + self.token(place) * self.heads.group + self.member(place)


def _share(
    length: jax.Array, tile: _Tile, scoring: Scoring, config: DecodeConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first position of a row's context, the number of positions per split, and the number of splits in use.

    The new tokens are not counted, because their keys are not in the cache yet; the last split adds them.
    """
    end = length - tile.tokens
    begin = scoring.first_visible(end) // config.block * config.block
    cached = end - begin
    fair = pl.cdiv(pl.cdiv(cached, config.splits), config.block) * config.block
    share = jnp.maximum(fair, config.min_share)
    return begin, share, jnp.maximum(pl.cdiv(cached, share), 1)


class _New(NamedTuple):
    """A row's new tokens for one head: all queries [n, dim], and each token's key and value [1, dim].

    Queries and keys are normalised and rotated, values are padded. `row` is [0]; added to the number of a row it gives
    the list of rows that loads and stores take.
    """

    queries: Halves
    keys: tuple[Halves, ...]
    values: tuple[jax.Array, ...]
    row: jax.Array

    @classmethod
    def load(
        cls,
        qkv_ref: Ref,
        norms_ref: HeadNorms | None,
        rotation_ref: Rotation | None,
        tile: _Tile,
        row: jax.Array,
        head: jax.Array,
        place: jax.Array,
        real: jax.Array,
    ) -> "_New":
        """Load the row's new tokens; queries of the tile that are not `real` [n] are zeros."""
        heads = tile.heads
        rows = tile.plane(row, head, tile.token(place)) + tile.member(place)
        tokens = jnp.broadcast_to(tile.in_batch(row, tile.token(place)), place.shape)
        of_queries, of_keys = (None, None) if norms_ref is None else norms_ref
        queries = load_ready(qkv_ref, of_queries, rotation_ref, heads, rows, tokens, real)
        keys, values, one = [], [], jnp.arange(1)
        for token in range(tile.tokens):
            plane = tile.plane(row, head, token) + heads.group + one
            there = tile.in_batch(row, token) + one
            keys.append(load_ready(qkv_ref, of_keys, rotation_ref, heads, plane, there, None))
            values.append(load_rows(qkv_ref, plane + 1, None, 0, heads.dim, heads.padded_dim))
        return cls(queries, tuple(keys), tuple(values), one)

    def write(self, cache_ref: Ref, heads: Heads, token: int, row: jax.Array) -> None:
        """Write a token's key to row `row` of the cache, and its value."""
        there, half, key = row + self.row, heads.dim // 2, self.keys[token]
        store_rows(cache_ref, there, None, 0, half, key.first)
        store_rows(cache_ref, there, None, half, half, key.second)
        store_rows(cache_ref, there + value_step(heads), None, 0, heads.dim, self.values[token])

    def add_to(
        self,
        running: RunningSoftmax,
        scoring: Scoring,
        token: int,
        seen: jax.Array | None,
        falls: jax.Array | None,
        kept: jnp.dtype,
    ) -> RunningSoftmax:
        """The softmax after a token's key and value, rounded to the cache's dtype as later steps will read them.

        `seen` [n] says which queries attend to it, None for all; `falls` [n] is added to their scores times log2(e).
        """
        key = Halves(*(part.astype(kept).astype(jnp.float32) for part in self.keys[token]))
        products = jnp.sum(self.queries.first.astype(jnp.float32) * key.first, axis=1)
        products += jnp.sum(self.queries.second.astype(jnp.float32) * key.second, axis=1)
        scores = scoring.log2_scores(products)
        scores = scores if falls is None else scores + falls
        return running.add_one(scores, self.values[token].astype(kept).reshape(-1), seen)


def _kernel(
    qkv_ref: Ref,
    cache_ref: Ref,
    page_table_ref: Ref,
    lengths_ref: Ref,
    pages_ref: Ref | None,
    norms_ref: HeadNorms | None,
    rotation_ref: Rotation | None,
    sinks_ref: Ref | None,
    slopes_ref: Ref | None,
    written_ref: Ref,
    *out_refs: Ref,
    tile: _Tile,
    scoring: Scoring,
    config: DecodeConfig,
) -> None:
    """The kernel's program for one head and one split of a row's context."""
    head, row, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, place = tile.heads, tile.place
    real, answer = tile.is_real(place), tile.answer(row, head, place)
    # Load at once whatever does not depend on the length: with a short context, every wait for memory counts.
    length = plgpu.load(lengths_ref.at[row])
    new = _New.load(qkv_ref, norms_ref, rotation_ref, tile, row, head, place, real)
    begin, share, active = _share(length, tile, scoring, config)

    if config.splits == 1:

        @pl.when(length == 0)
        def _leave_zeros() -> None:
            zeros = jnp.zeros((*place.shape, heads.padded_dim), jnp.float32)
            store_rows(out_refs[0], answer, real, 0, heads.dim, zeros)

    @pl.when((length > 0) & (split < active))
    def _attend() -> None:
        cached = length - tile.tokens
        positions = jnp.broadcast_to(cached + tile.token(place), place.shape)
        slopes = None
        if slopes_ref is not None:
            slopes = plgpu.load(slopes_ref.at[head * heads.group + tile.member(place)], mask=real, other=0) * LOG2_E
        first = begin + split * share
        end = jnp.minimum(first + share, cached)

        def add_block(index: Any, running: RunningSoftmax) -> RunningSoftmax:
            return add_keys(
                running, new.queries, positions, cache_ref, page_table_ref, heads, scoring,
                row=row, head=head, first=first + index * config.block, end=end, block=config.block, masked=True,
                slopes=slopes,
            )  # fmt: skip

        pages = _pages_of_new(page_table_ref, pages_ref, tile, row, cached)
        blocks = jnp.maximum(pl.cdiv(end - first, config.block), 0)
        empty = RunningSoftmax.empty(place.shape, heads.padded_dim, jnp.exp2)
        running = lax.fori_loop(0, blocks, add_block, empty)

        def add_new(running: RunningSoftmax) -> RunningSoftmax:
            for token, page in enumerate(pages):
                position = cached if token == 0 else cached + token
                new.write(written_ref, heads, token, cache_rows(page, heads, head, position % heads.page_size))
                seen = None if tile.tokens == 1 else scoring.visible(positions, position)
                falls = None if slopes is None else slopes * (position - positions).astype(jnp.float32)
                running = new.add_to(running, scoring, token, seen, falls, written_ref.dtype)
            return running

        running = lax.cond(split == active - 1, add_new, lambda running: running, running)
        if config.splits > 1:
            _store_part(out_refs, tile.partial(row, head, split, config.splits, place), real, heads, running)
            return
        if sinks_ref is not None:
            sinks = plgpu.load(sinks_ref.at[head * heads.group + tile.member(place)], mask=real, other=MASKED)
            running = running.add_sinks(sinks * LOG2_E)
        store_rows(out_refs[0], answer, real, 0, heads.dim, running.result())


def _pages_of_new(
    page_table_ref: Ref, pages_ref: Ref | None, tile: _Tile, row: jax.Array, cached: jax.Array
) -> list[jax.Array]:
    """The page that takes each of a row's new tokens, which follow `cached` ones."""
    if pages_ref is None:
        return [plgpu.load(page_table_ref.at[row, cached // tile.heads.page_size])]
    return [plgpu.load(pages_ref.at[tile.in_batch(row, token)]) for token in range(tile.tokens)]


def _store_part(
    out_refs: tuple[Ref, ...], rows: jax.Array, real: jax.Array, heads: Heads, running: RunningSoftmax
) -> None:
    """Store a split's softmax for `_combine`."""
    weighted_ref, maximum_ref, total_ref = out_refs
    store_rows(weighted_ref, rows, real, 0, heads.dim, running.weighted)
    plgpu.store(maximum_ref.at[rows], running.maximum, mask=real)
    plgpu.store(total_ref.at[rows], running.total, mask=real)


def _combine(
    partials: list[jax.Array],
    lengths: jax.Array,
    sinks: jax.Array | None,
    tile: _Tile,
    scoring: Scoring,
    config: DecodeConfig,
    dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    """The attention [tokens * kv * group, dim] of each token and head, from the softmax of every split."""
    weighted, maximum, total = partials
    heads, tokens = tile.heads, lengths.shape[0] * tile.tokens
    out = jax.ShapeDtypeStruct((tokens * heads.kv * heads.group, heads.dim), dtype)
    inputs = (weighted, maximum, total, lengths, sinks)
    return pl.pallas_call(
        partial(_combine_kernel, tile=tile, scoring=scoring, config=config),
        grid=(heads.kv * heads.group, tokens),
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
    tile: _Tile,
    scoring: Scoring,
    config: DecodeConfig,
) -> None:
    """The kernel's program for one query head of one token."""
    query_head, token = pl.program_id(0), pl.program_id(1)
    heads, row = tile.heads, tile.row_of(token)
    length = plgpu.load(lengths_ref.at[row])
    head, member = query_head // heads.group, query_head % heads.group
    _, _, active = _share(length, tile, scoring, config)
    split = jnp.arange(pl.next_power_of_2(config.splits))
    there = (split < active) & (length > 0)
    place = member if tile.tokens == 1 else token % tile.tokens * heads.padded_group + member
    answer = tile.partial(row, head, split, config.splits, place)
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
    store_rows(out_ref, token * heads.kv * heads.group + query_head + one, None, 0, heads.dim, mean[None, :])
