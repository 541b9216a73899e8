"""Attention of prompt chunks over pages on Hopper, as a Pallas kernel on Mosaic GPU.

It is FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608): one warpgroup copies queries, keys and values into shared
memory, page by page. Two others have 64 query rows of a tile each and take turns, so that the softmax of one overlaps
the products of the other. A program computes several tiles, and copies ahead into the next one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.locations import PageLocations
from pallas_kernels.attention.masks import LOG2_E, MASKED, Scoring
from pallas_kernels.mosaic import MULTIPROCESSORS, load_rows, swizzled

Ref = Any
WARPGROUP_ROWS = 64
ATTENDING = 2
BLOCK = 128
"""The keys of a block."""
SLOTS = 2
"""How many blocks of keys, and of values, are in shared memory."""

_WGMMA = plgpu.Layout.WGMMA


def tile_tokens(group: int) -> int:
    """How many consecutive tokens of a row make a tile, for `group` query heads of a key-value head."""
    return ATTENDING * WARPGROUP_ROWS // group


def takes(
    qkv: jax.Array, cache: jax.Array, scoring: Scoring, sinks: jax.Array | None, slopes: jax.Array | None
) -> bool:
    """Whether `attend` supports the arguments: plain causal attention, heads of 128 channels and a 16-bit dtype."""
    plain = scoring.soft_cap is None and not scoring.is_limited and sinks is None and slopes is None
    group, dim = qkv.shape[2] - 2, qkv.shape[3]
    shapes = dim == BLOCK and WARPGROUP_ROWS % group == 0 and BLOCK % cache.shape[3] == 0 and cache.shape[3] % 8 == 0
    return plain and shapes and qkv.dtype == cache.dtype and qkv.dtype in (jnp.bfloat16, jnp.float16)


def attend(
    queries: jax.Array,
    cache: jax.Array,
    locations: PageLocations,
    row_of_tile: jax.Array,
    first_of_tile: jax.Array,
    *,
    scoring: Scoring,
    interpret: Any = None,
) -> jax.Array:
    """Causal attention [t, h, g, d] of rotated queries [t, h, g, d] over the pages of their rows.

    Tile i has `tile_tokens(g)` tokens of row row_of_tile[i] (negative for none), starting at token first_of_tile[i].
    The cache must already hold the keys and values of these tokens. Results of tokens without a tile are undefined.
    """
    assert locations.starts is not None
    starts, lengths = locations.starts, locations.lengths
    tokens, kv, group, dim = queries.shape
    row = jnp.maximum(row_of_tile, 0)
    row_of_tile = jnp.where(lengths[row] > 0, row_of_tile, -1)
    # This makes a copy: the table may be a view of the host's packed vector, and operands must be 256-byte aligned.
    page_table = jnp.maximum(locations.page_table, 0)
    position_of_tile = lengths[row] - starts[row + 1] + first_of_tile
    tiles = kv * row_of_tile.shape[0]
    sizes = _Sizes(kv, group, dim, cache.shape[3], queries.dtype, scoring.scale, tiles, min(MULTIPROCESSORS, tiles))

    def entry(*refs: Ref) -> None:
        pl.run_scoped(
            lambda *shared: _Program.begin(sizes, _Operands(*refs), _Shared(*shared)).run(),
            *_Shared.of(sizes),
            collective_axes="warpgroups",
        )

    run: Any = plgpu.kernel(
        body=entry,
        out_type=jax.ShapeDtypeStruct((tokens, kv, group, dim), queries.dtype),
        grid=(sizes.programs,),
        grid_names=("programs",),
        num_threads=ATTENDING + 1,
        thread_name="warpgroups",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    by_head = queries.transpose(1, 0, 2, 3).reshape(kv, tokens * group, dim)
    result: jax.Array = run(by_head, cache, page_table, row_of_tile, first_of_tile, position_of_tile, starts)
    return result


@dataclass(frozen=True)
class _Sizes:
    """The sizes for which the kernel is compiled; `tiles` counts those of all key-value heads."""

    kv: int
    group: int
    dim: int
    page_size: int
    dtype: jnp.dtype
    scale: float
    tiles: int
    programs: int

    @property
    def warpgroup_tokens(self) -> int:
        """How many tokens of a tile one warpgroup computes."""
        return WARPGROUP_ROWS // self.group

    @property
    def block_pages(self) -> int:
        """How many pages make a block of keys."""
        return BLOCK // self.page_size


class _Operands(NamedTuple):
    """References to global memory: the arguments of `attend`, with queries [h, t * g, d], and the result."""

    queries: Ref
    cache: Ref
    page_table: Ref
    row_of_tile: Ref
    first_of_tile: Ref
    position_of_tile: Ref
    starts: Ref
    out: Ref


class _Barriers(NamedTuple):
    """A barrier for the queries of a tile, and one for each slot of keys and of values."""

    queries: Ref
    keys: Ref
    values: Ref


class _Shared(NamedTuple):
    """Buffers in shared memory, and barriers that signal that one is filled or free, or that a warpgroup's turn ends.

    Queries are [ATTENDING * WARPGROUP_ROWS, d], keys and values [SLOTS, BLOCK, d], out [ATTENDING, WARPGROUP_ROWS, d].
    """

    queries: Ref
    keys: Ref
    values: Ref
    out: Ref
    full: _Barriers
    free: _Barriers
    turns: Ref

    @classmethod
    def of(cls, sizes: _Sizes) -> "_Shared":
        """The shapes and kinds of the buffers and barriers to allocate."""
        ring = plgpu.SMEM((SLOTS, BLOCK, sizes.dim), sizes.dtype, transforms=swizzled(64, 128))
        full = plgpu.Barrier(num_arrivals=sizes.block_pages, num_barriers=SLOTS)
        free = plgpu.Barrier(num_arrivals=ATTENDING, num_barriers=SLOTS)
        return cls(
            queries=plgpu.SMEM((ATTENDING * WARPGROUP_ROWS, sizes.dim), sizes.dtype),
            keys=ring,
            values=ring,
            out=plgpu.SMEM((ATTENDING, WARPGROUP_ROWS, sizes.dim), sizes.dtype),
            full=_Barriers(plgpu.Barrier(), full, full),
            free=_Barriers(plgpu.Barrier(num_arrivals=ATTENDING), free, free),
            turns=plgpu.Barrier(num_arrivals=ATTENDING),
        )


class _Tile(NamedTuple):
    """The tile that a program works on.

    Attributes:
        begun: how many tiles the program computed before it.
        blocks: how many blocks of keys those had.
        head: its key-value head.
        row: its row.
        first: its first token.
        position: that token's place in its sequence.
        end: the token after the row's last.
        steps: how many blocks of keys it has.
    """

    begun: jax.Array
    blocks: jax.Array
    head: jax.Array
    row: jax.Array
    first: jax.Array
    position: jax.Array
    end: jax.Array
    steps: jax.Array


class _Sums(NamedTuple):
    """A softmax over the keys added so far, in a warpgroup's registers: `RunningSoftmax` of scores times log2(e)."""

    weighted: jax.Array
    maximum: jax.Array
    total: jax.Array

    @classmethod
    def empty(cls, dim: int) -> "_Sums":
        """The softmax before any key."""
        column = _WGMMA.reduce(1)
        maximum = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), MASKED, jnp.float32), column)
        total = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), column)
        return cls(plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, dim), jnp.float32), _WGMMA), maximum, total)

    def rescaled(self, scores: jax.Array, dtype: jnp.dtype) -> tuple["_Sums", jax.Array]:
        """The softmax after a block of keys but without its values, and the weights of those in `dtype`."""
        larger = jnp.maximum(self.maximum, scores.max(axis=1))
        correction = jnp.exp2(self.maximum - larger)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(larger, scores.shape, [0]))
        weighted = self.weighted * lax.broadcast_in_dim(correction, self.weighted.shape, [0])
        total = self.total * correction + weights.sum(axis=1)
        # All of it belongs to this turn: the compiler must not move it behind the products of the next one.
        weighted, total, larger, narrow = lax.optimization_barrier((weighted, total, larger, weights.astype(dtype)))
        return _Sums(weighted, larger, total), narrow


def _slot_of(block: jax.Array) -> jax.Array:
    return lax.rem(block, jnp.array(SLOTS, block.dtype))


def _clear(values_ref: Ref, first: jax.Array) -> None:
    """Set the values [BLOCK, dim] from `first` on to 0: a weight of 0 times a value that is not finite is NaN."""
    for row in range(0, BLOCK, WARPGROUP_ROWS):
        part = values_ref.at[pl.ds(row, WARPGROUP_ROWS)]
        values = load_rows(part)
        place = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=_WGMMA)
        part[...] = jnp.where(place + row < first, values, jnp.zeros_like(values))
    plgpu.commit_smem()


@dataclass(frozen=True)
class _Program:
    """The work of one warpgroup of one program."""

    sizes: _Sizes
    operands: _Operands
    shared: _Shared
    program: jax.Array
    warpgroup: jax.Array

    @classmethod
    def begin(cls, sizes: _Sizes, operands: _Operands, shared: _Shared) -> "_Program":
        """The work of the warpgroup that executes this."""
        return cls(sizes, operands, shared, lax.axis_index("programs"), lax.axis_index("warpgroups"))

    def run(self) -> None:
        """Compute the program's tiles, or copy the operands for the warpgroups that do."""

        @pl.when(self.warpgroup < ATTENDING)
        def _attend() -> None:
            plgpu.set_max_registers(232, action="increase")
            self._walk(self._attend_tile)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(self.warpgroup == ATTENDING)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            self._see_all_free(*self._walk(self._copy_tile))

    def _walk(self, handle: Callable[[_Tile], None]) -> tuple[jax.Array, jax.Array]:
        """Call `handle` for each of the program's tiles with keys; returns their number and that of their blocks."""
        refs, kv, programs = self.operands, jnp.int32(self.sizes.kv), self.sizes.programs

        def visit(index: jax.Array, counts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            begun, blocks = counts
            linear = index * programs + self.program
            tile, head = lax.div(linear, kv), lax.rem(linear, kv)
            row, first, position = refs.row_of_tile[tile], refs.first_of_tile[tile], refs.position_of_tile[tile]
            end = refs.starts[jnp.maximum(row, 0) + 1]
            last = position + jnp.minimum(ATTENDING * self.sizes.warpgroup_tokens, end - first)
            steps = jnp.where(row >= 0, lax.div(last + BLOCK - 1, BLOCK), 0)

            @pl.when(steps > 0)
            def _handle() -> None:
                handle(_Tile(begun, blocks, head, row, first, position, end, steps))

            return begun + (steps > 0).astype(begun.dtype), blocks + steps

        count = lax.div(self.sizes.tiles - self.program + programs - 1, jnp.int32(programs))
        counts: tuple[jax.Array, jax.Array] = lax.fori_loop(0, count, visit, (jnp.int32(0), jnp.int32(0)))
        return counts

    def _attend_tile(self, tile: _Tile) -> None:
        """Compute this warpgroup's rows of a tile."""
        shared, mine = self.shared, self.sizes.warpgroup_tokens
        token = tile.first + self.warpgroup * mine
        place = tile.position + self.warpgroup * mine
        length = tile.position + tile.end - tile.first
        plgpu.barrier_wait(shared.full.queries)
        queries = load_rows(shared.queries.at[pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)])
        plgpu.barrier_arrive(shared.free.queries)
        sums = _Sums.empty(self.sizes.dim)
        pl.when(self.warpgroup == 1)(self._pass_turn)

        def add_block(masked: bool) -> Callable[[jax.Array, _Sums], _Sums]:
            return lambda step, sums: self._add_block(tile, queries, place, length, step, sums, masked)

        # Both warpgroups loop over all blocks of the tile, so that their turns match.
        whole = jnp.minimum(lax.div(place + 1, BLOCK), tile.steps)
        sums = lax.fori_loop(0, whole, add_block(masked=False), sums)
        sums = lax.fori_loop(whole, tile.steps, add_block(masked=True), sums)
        pl.when(self.warpgroup == 0)(self._pass_turn)
        self._store(tile, token, sums)

    def _add_block(
        self,
        tile: _Tile,
        queries: jax.Array,
        place: jax.Array,
        length: jax.Array,
        step: jax.Array,
        sums: _Sums,
        masked: bool,
    ) -> _Sums:
        """The sums after one block of keys, for queries that start at position `place` of a row of `length` tokens."""
        shared, slot = self.shared, _slot_of(tile.blocks + step)
        plgpu.barrier_wait(shared.full.keys.at[slot])
        scores = self._scores(queries, shared.keys.at[slot])
        plgpu.barrier_arrive(shared.free.keys.at[slot])
        scores = scores * (self.sizes.scale * LOG2_E)
        if masked:
            asks = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=_WGMMA)
            keys = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_WGMMA)
            seen = lax.div(asks, jnp.int32(self.sizes.group)) + place >= keys + step * BLOCK
            scores = jnp.where(seen, scores, MASKED)
        sums, weights = sums.rescaled(scores, self.sizes.dtype)
        plgpu.barrier_arrive(shared.turns)
        plgpu.barrier_wait(shared.full.values.at[slot])
        plgpu.barrier_wait(shared.turns)
        if masked:
            # The first warpgroup's turn comes before the other's, so it clears the values for both.
            unseen = (step + 1) * BLOCK > length
            clear = (self.warpgroup == 0) & unseen
            pl.when(clear)(lambda: _clear(shared.values.at[slot], length - step * BLOCK))

        def add_values(sum_ref: Ref) -> None:
            plgpu.wgmma(sum_ref, weights, shared.values.at[slot])

        weighted = pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(sums.weighted))
        plgpu.barrier_arrive(shared.free.values.at[slot])
        return sums._replace(weighted=weighted)

    def _scores(self, queries: jax.Array, keys_ref: Ref) -> jax.Array:
        """The products [WARPGROUP_ROWS, BLOCK] with the keys; the turn passes on while they are computed."""

        def products(sum_ref: Ref) -> jax.Array:
            plgpu.wgmma(sum_ref, queries, keys_ref.transpose((1, 0)))
            self._pass_turn()
            return sum_ref[...]

        accumulator = plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, BLOCK), jnp.float32)
        scores: jax.Array = pl.run_scoped(products, accumulator)
        return scores

    def _pass_turn(self) -> None:
        plgpu.barrier_arrive(self.shared.turns)
        plgpu.barrier_wait(self.shared.turns)

    def _store(self, tile: _Tile, token: jax.Array, sums: _Sums) -> None:
        """Write the results of this warpgroup's tokens, the first of which is `token`."""
        smem = self.shared.out.at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        mean = sums.weighted / lax.broadcast_in_dim(sums.total, sums.weighted.shape, [0])
        smem[...] = mean.astype(self.sizes.dtype)
        plgpu.commit_smem()

        for index in range(self.sizes.warpgroup_tokens):

            @pl.when(token + index < tile.end)
            def _store(index: int = index) -> None:
                rows = pl.ds(index * self.sizes.group, self.sizes.group)
                plgpu.copy_smem_to_gmem(smem.at[rows], self.operands.out.at[token + index, tile.head])

    def _copy_tile(self, tile: _Tile) -> None:
        """Copy a tile's queries, and its keys and values block by block, each as soon as its slot is free."""
        shared = self.shared

        @pl.when(tile.begun > 0)
        def _wait_for_queries() -> None:
            plgpu.barrier_wait(shared.free.queries)

        rows = pl.ds(tile.first * self.sizes.group, ATTENDING * WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(self.operands.queries.at[tile.head, rows], shared.queries, shared.full.queries)

        @pl.loop(0, tile.steps)
        def _block(step: jax.Array) -> None:
            self._copy_block(tile, step)

    def _copy_block(self, tile: _Tile, step: jax.Array) -> None:
        """Copy a block's keys and then its values, page by page."""
        shared, slot = self.shared, _slot_of(tile.blocks + step)
        page_size, table_ref = self.sizes.page_size, self.operands.page_table
        rings = (
            (shared.keys, shared.full.keys, shared.free.keys),
            (shared.values, shared.full.values, shared.free.values),
        )
        for plane, (smem, full, free) in enumerate(rings):

            @pl.when(tile.blocks + step >= SLOTS)
            def _wait(free: Ref = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            for index in range(self.sizes.block_pages):
                column = jnp.minimum(step * self.sizes.block_pages + index, table_ref.shape[1] - 1)
                into = smem.at[slot, pl.ds(index * page_size, page_size)]
                page = self.operands.cache.at[table_ref[tile.row, column], plane, tile.head]
                plgpu.copy_gmem_to_smem(page, into, full.at[slot])

    def _see_all_free(self, begun: jax.Array, blocks: jax.Array) -> None:
        """Wait for the remaining signals of every barrier, as Mosaic GPU's interpreter requires."""
        free = self.shared.free

        @pl.when(begun > 0)
        def _see_queries_free() -> None:
            plgpu.barrier_wait(free.queries)

        @pl.loop(jnp.maximum(blocks - SLOTS, 0), blocks)
        def _see_blocks_free(block: jax.Array) -> None:
            plgpu.barrier_wait(free.keys.at[_slot_of(block)])
            plgpu.barrier_wait(free.values.at[_slot_of(block)])
