"""Attention of prompt chunks for Hopper as a Pallas kernel on Mosaic GPU, over pages.

The structure is FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608): one warpgroup copies queries, keys and
values, page by page, into shared memory; two others each own 64 query rows of a tile and take turns, so that one's
softmax runs beside the other's products. A program walks over tiles, and its copies run ahead into the next one.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.masks import LOG2_E, MASKED, Scoring
from pallas_kernels.mosaic import MULTIPROCESSORS, load_rows, swizzled

Ref = Any
WARPGROUP_ROWS = 64
ATTENDING = 2
BLOCK = 128
"""Keys of a block."""
SLOTS = 2
"""Blocks of keys and of values in shared memory."""

_WGMMA = plgpu.Layout.WGMMA


def tile_tokens(group: int) -> int:
    """Consecutive tokens of a row that a tile holds, times the query heads of a key-value head."""
    return ATTENDING * WARPGROUP_ROWS // group


def takes(qkv: jax.Array, cache: jax.Array, scoring: Scoring, sinks: jax.Array | None) -> bool:
    """Whether `attend` computes this kind of attention: plain causal, heads of 128 channels, 16 bits."""
    plain = scoring.soft_cap is None and scoring.window is None and sinks is None
    group, dim = qkv.shape[2] - 2, qkv.shape[3]
    shapes = dim == BLOCK and WARPGROUP_ROWS % group == 0 and BLOCK % cache.shape[3] == 0 and cache.shape[3] % 8 == 0
    return plain and shapes and qkv.dtype == cache.dtype and qkv.dtype in (jnp.bfloat16, jnp.float16)


def attend(
    queries: jax.Array,
    cache: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    row_of_tile: jax.Array,
    first_of_tile: jax.Array,
    *,
    scoring: Scoring,
    interpret: Any = None,
) -> jax.Array:
    """Causal attention [t, h, g, d] of rotated queries [t, h, g, d] over the pages of their rows.

    A tile is `tile_tokens(g)` tokens of row row_of_tile[i] (negative for none) from token first_of_tile[i] on; the
    cache holds the keys of these tokens already. What no tile covers is not written.
    """
    tokens, kv, group, dim = queries.shape
    page_size, dtype = cache.shape[3], queries.dtype
    mine = WARPGROUP_ROWS // group
    pages = BLOCK // page_size
    row = jnp.maximum(row_of_tile, 0)
    row_of_tile = jnp.where(lengths[row] > 0, row_of_tile, -1)
    # A copy: the table may be a view of what the host sent, and the call wants its operands 256-byte aligned.
    page_table = jnp.maximum(page_table, 0)
    position_of_tile = lengths[row] - starts[row + 1] + first_of_tile
    tiles = kv * row_of_tile.shape[0]
    programs = min(MULTIPROCESSORS, tiles)

    def kernel(refs: tuple[Ref, ...], scratch: Any) -> None:
        queries_ref, cache_ref, table_ref, row_ref, first_ref, position_ref, starts_ref, out_ref = refs
        q_smem, k_smem, v_smem, out_smem, (q_full, k_full, v_full), (q_free, k_free, v_free), turns = scratch
        program, warpgroup = lax.axis_index("programs"), lax.axis_index("warpgroups")

        def pass_turn() -> None:
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(turns)

        def slot_of(block: jax.Array) -> jax.Array:
            return lax.rem(block, jnp.array(SLOTS, block.dtype))

        def clear(values_ref: Ref, first: jax.Array) -> None:
            """Zeros in the values [BLOCK, dim] from `first` on: 0 times what else lies there may be NaN."""
            for row in range(0, BLOCK, WARPGROUP_ROWS):
                part = values_ref.at[pl.ds(row, WARPGROUP_ROWS)]
                values = load_rows(part)
                place = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=_WGMMA)
                part[...] = jnp.where(place + row < first, values, jnp.zeros_like(values))
            plgpu.commit_smem()

        def walk(handle: Any) -> tuple[jax.Array, jax.Array]:
            """Call `handle(begun, blocks, head, row, first, position, end, steps)` for each of the program's tiles.

            `begun` counts the tiles before, `blocks` their blocks of keys; tiles without any are left out. Returns both
            counts at the end.
            """

            def visit(index: jax.Array, counts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                begun, blocks = counts
                linear = index * programs + program
                tile, head = lax.div(linear, jnp.int32(kv)), lax.rem(linear, jnp.int32(kv))
                row, first, position = row_ref[tile], first_ref[tile], position_ref[tile]
                end = starts_ref[jnp.maximum(row, 0) + 1]
                last = position + jnp.minimum(ATTENDING * mine, end - first)
                steps = jnp.where(row >= 0, lax.div(last + BLOCK - 1, BLOCK), 0)

                @pl.when(steps > 0)
                def _handle() -> None:
                    handle(begun, blocks, head, row, first, position, end, steps)

                return begun + (steps > 0).astype(begun.dtype), blocks + steps

            count = lax.div(tiles - program + programs - 1, jnp.int32(programs))
            counts: tuple[jax.Array, jax.Array] = lax.fori_loop(0, count, visit, (jnp.int32(0), jnp.int32(0)))
            return counts

        def attend_tile(
            begun: jax.Array, blocks: jax.Array, head: jax.Array, row: jax.Array, first: jax.Array,
            position: jax.Array, end: jax.Array, steps: jax.Array,
        ) -> None:  # fmt: skip
            token = first + warpgroup * mine
            place = position + warpgroup * mine
            length = position + end - first
            plgpu.barrier_wait(q_full)
            asking = load_rows(q_smem.at[pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)])
            plgpu.barrier_arrive(q_free)
            column = _WGMMA.reduce(1)
            maximum = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), MASKED, jnp.float32), column)
            total = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), column)
            weighted = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, dim), jnp.float32), _WGMMA)
            pl.when(warpgroup == 1)(pass_turn)

            def add_block(step: jax.Array, carry: Any, masked: bool) -> Any:
                weighted, maximum, total = carry
                slot = slot_of(blocks + step)
                plgpu.barrier_wait(k_full.at[slot])

                def products(sum_ref: Ref) -> jax.Array:
                    plgpu.wgmma(sum_ref, asking, k_smem.at[slot].transpose((1, 0)))
                    pass_turn()
                    return sum_ref[...]

                scores = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, BLOCK), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                scores = scores * (scoring.scale * LOG2_E)
                if masked:
                    asks = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=_WGMMA)
                    keys = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_WGMMA)
                    seen = lax.div(asks, jnp.int32(group)) + place >= keys + step * BLOCK
                    scores = jnp.where(seen, scores, MASKED)
                larger = jnp.maximum(maximum, scores.max(axis=1))
                correction = jnp.exp2(maximum - larger)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(larger, scores.shape, [0]))
                weighted *= lax.broadcast_in_dim(correction, weighted.shape, [0])
                total = total * correction + weights.sum(axis=1)
                # All of it before the turn passes: the compiler may not move it behind the products that wait.
                weighted, total, larger, narrow = lax.optimization_barrier(
                    (weighted, total, larger, weights.astype(dtype))
                )
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turns)
                if masked:
                    # The first warpgroup's turn comes before the other's, so it clears the values for both.
                    unseen = (step + 1) * BLOCK > length
                    pl.when((warpgroup == 0) & unseen)(lambda: clear(v_smem.at[slot], length - step * BLOCK))

                def add_values(sum_ref: Ref) -> None:
                    plgpu.wgmma(sum_ref, narrow, v_smem.at[slot])

                weighted = pl.run_state(add_values)(plgpu.WGMMAAccumulatorRef.init(weighted))
                plgpu.barrier_arrive(v_free.at[slot])
                return weighted, larger, total

            # Both warpgroups walk all blocks of the tile, so that they take turns to the end.
            whole = jnp.minimum(lax.div(place + 1, BLOCK), steps)
            carry = lax.fori_loop(0, whole, partial(add_block, masked=False), (weighted, maximum, total))
            weighted, maximum, total = lax.fori_loop(whole, steps, partial(add_block, masked=True), carry)
            pl.when(warpgroup == 0)(pass_turn)

            smem = out_smem.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mean = weighted / lax.broadcast_in_dim(total, weighted.shape, [0])
            smem[...] = mean.astype(dtype)
            plgpu.commit_smem()

            for index in range(mine):

                @pl.when(token + index < end)
                def _store(index: int = index) -> None:
                    rows = pl.ds(index * group, group)
                    plgpu.copy_smem_to_gmem(smem.at[rows], out_ref.at[token + index, head])

        def copy_tile(
            begun: jax.Array, blocks: jax.Array, head: jax.Array, row: jax.Array, first: jax.Array,
            position: jax.Array, end: jax.Array, steps: jax.Array,
        ) -> None:  # fmt: skip
            @pl.when(begun > 0)
            def _wait_for_queries() -> None:
                plgpu.barrier_wait(q_free)

            source = queries_ref.at[head, pl.ds(first * group, ATTENDING * WARPGROUP_ROWS)]
            plgpu.copy_gmem_to_smem(source, q_smem, q_full)

            @pl.loop(0, steps)
            def _block(step: jax.Array) -> None:
                slot = slot_of(blocks + step)
                for plane, (smem, full, free) in enumerate(((k_smem, k_full, k_free), (v_smem, v_full, v_free))):

                    @pl.when(blocks + step >= SLOTS)
                    def _wait(free: Ref = free) -> None:
                        plgpu.barrier_wait(free.at[slot])

                    for index in range(pages):
                        column = jnp.minimum(step * pages + index, table_ref.shape[1] - 1)
                        into = smem.at[slot, pl.ds(index * page_size, page_size)]
                        plgpu.copy_gmem_to_smem(cache_ref.at[table_ref[row, column], plane, head], into, full.at[slot])

        @pl.when(warpgroup < ATTENDING)
        def _attend() -> None:
            plgpu.set_max_registers(232, action="increase")
            walk(attend_tile)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == ATTENDING)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            begun, blocks = walk(copy_tile)

            # Every barrier ends with all its signals seen, as Mosaic GPU's interpreter insists.
            @pl.when(begun > 0)
            def _see_queries_free() -> None:
                plgpu.barrier_wait(q_free)

            @pl.loop(jnp.maximum(blocks - SLOTS, 0), blocks)
            def _see_blocks_free(block: jax.Array) -> None:
                plgpu.barrier_wait(k_free.at[slot_of(block)])
                plgpu.barrier_wait(v_free.at[slot_of(block)])

    def entry(*refs: Ref) -> None:
        ring = plgpu.SMEM((SLOTS, BLOCK, dim), dtype, transforms=swizzled(64, 128))
        full = plgpu.Barrier(num_arrivals=pages, num_barriers=SLOTS)
        free = plgpu.Barrier(num_arrivals=ATTENDING, num_barriers=SLOTS)
        pl.run_scoped(
            lambda *scratch: kernel(refs, scratch),
            plgpu.SMEM((ATTENDING * WARPGROUP_ROWS, dim), dtype),
            ring,
            ring,
            plgpu.SMEM((ATTENDING, WARPGROUP_ROWS, dim), dtype),
            (plgpu.Barrier(), full, full),
            (plgpu.Barrier(num_arrivals=ATTENDING), free, free),
            plgpu.Barrier(num_arrivals=ATTENDING),
            collective_axes="warpgroups",
        )

    run: Any = plgpu.kernel(
        body=entry,
        out_type=jax.ShapeDtypeStruct((tokens, kv, group, dim), dtype),
        grid=(programs,),
        grid_names=("programs",),
        num_threads=ATTENDING + 1,
        thread_name="warpgroups",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    by_head = queries.transpose(1, 0, 2, 3).reshape(kv, tokens * group, dim)
    result: jax.Array = run(by_head, cache, page_table, row_of_tile, first_of_tile, position_of_tile, starts)
    return result
