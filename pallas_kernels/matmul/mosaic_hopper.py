"""Products of many rows for Hopper as a Pallas kernel on Mosaic GPU, with SwiGLU or a residual in its epilogue.

The structure is that of warp-specialised, persistent matmuls (CUTLASS's "pingpong" family): in each program one
warpgroup copies blocks of both operands into a ring of shared memory, two others multiply them, 64 rows each. Two
programs of a cluster work on neighbouring rows and each fetches half of the weights for both. A program walks over
tiles, and its copies run ahead into the next one while the last is written.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.tuned import Wide
from pallas_kernels.mosaic import MULTIPROCESSORS, load_rows, swizzled

Ref = Any
WARPGROUP_ROWS = 64
MULTIPLYING = 2
ROWS = WARPGROUP_ROWS * MULTIPLYING
"""Rows of a tile."""
DEPTH = 64
"""Inputs of a block: 128 bytes, the widest swizzle."""
OUT_COLUMNS = 64
"""Outputs that are written at once."""

_BLOCK = swizzled(DEPTH, 128)


def product(
    x: jax.Array, w: jax.Array, residual: jax.Array | None, config: Wide, *, interpret: Any = None
) -> jax.Array:
    """`linear` for weights w [1, n, k], `gated_linear` for [2, n, k]: [m, n] in x's dtype, which is 16 bits wide.

    x has at least as many rows as a cluster takes; n is a multiple of `config.tile_n`, k one of 64. `interpret` is for
    Mosaic GPU's interpreter, which jax has from 0.11.2 on.
    """
    (m, k), (planes, n, _) = x.shape, w.shape
    if residual is not None and m % (ROWS * config.cluster):
        # Rows past the end come as zeros with the copies of x and w, but not with the plain reads of a residual.
        return (
            product(x, w, None, config, interpret=interpret).astype(jnp.float32) + residual.astype(jnp.float32)
        ).astype(x.dtype)
    rows, columns, steps = pl.cdiv(m, ROWS * config.cluster), n // config.tile_n, k // DEPTH
    programs = min(MULTIPROCESSORS // config.cluster, rows * columns)
    slots, out_slots = config.slots, min(2, config.tile_n // config.out_columns)

    def slot_of(block: jax.Array) -> jax.Array:
        return lax.rem(block, jnp.int32(slots))

    def tile_of(index: jax.Array, program: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Row and column of a tile: a band of rows at a time, column by column, whose operands the L2 cache holds."""
        linear = index * programs + program
        band, within = lax.div(linear, config.band * columns), lax.rem(linear, config.band * columns)
        height = jnp.minimum(rows - band * config.band, config.band)
        return band * config.band + lax.rem(within, height), lax.div(within, height)

    def kernel(x_ref: Ref, w_ref: Ref, residual_ref: Ref | None, out_ref: Ref, scratch: Any) -> None:
        x_smem, w_smem, out_smem, full, free = scratch
        program, warpgroup = lax.axis_index("programs"), lax.axis_index("warpgroups")
        member = lax.axis_index("pair") if config.cluster == 2 else 0
        tiles = lax.div(rows * columns - program + programs - 1, programs)

        def multiply(index: jax.Array, *sum_refs: Ref) -> list[jax.Array]:
            """The float32 sums of this warpgroup's rows, one for each plane."""

            @pl.loop(0, steps)
            def _block(step: jax.Array) -> None:
                block = index * steps + step
                slot = slot_of(block)
                plgpu.barrier_wait(full.at[slot])
                mine = x_smem.at[slot, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
                for plane, sum_ref in enumerate(sum_refs):
                    plgpu.wgmma(sum_ref, mine, w_smem.at[slot, plane].transpose((1, 0)))
                plgpu.wgmma_wait(planes)  # what still runs reads this block; the one before is free

                @pl.when(step > 0)
                def _release() -> None:
                    plgpu.barrier_arrive(free.at[slot_of(block - 1)])

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot_of((index + 1) * steps - 1)])
            return [sum_ref[...] for sum_ref in sum_refs]

        def write(sums: list[jax.Array], row: jax.Array, column: jax.Array) -> None:
            mine = pl.ds((row * config.cluster + member) * ROWS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            result = sums[0] if planes == 1 else sums[0] / (1.0 + jnp.exp(-sums[0])) * sums[1]
            for part, first in enumerate(range(0, config.tile_n, config.out_columns)):
                values = result[:, first : first + config.out_columns]
                outputs = pl.ds(column * config.tile_n + first, config.out_columns)
                if residual_ref is not None:
                    added = load_rows(residual_ref.at[mine, outputs])
                    values += added.astype(jnp.float32)
                place = out_smem.at[warpgroup, part % out_slots]
                plgpu.wait_smem_to_gmem(out_slots - 1, wait_read_only=True)
                place[...] = values.astype(x.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(place, out_ref.at[mine, outputs])

        @pl.when(warpgroup < MULTIPLYING)
        def _multiply() -> None:
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, tiles)
            def _tile(index: jax.Array) -> None:
                sums = [plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, config.tile_n), jnp.float32)] * planes
                write(pl.run_scoped(lambda *refs: multiply(index, *refs), *sums), *tile_of(index, program))

            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == MULTIPLYING)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, tiles)
            def _tile(index: jax.Array) -> None:
                row, column = tile_of(index, program)
                mine = pl.ds((row * config.cluster + member) * ROWS, ROWS)
                outputs = pl.ds(column * config.tile_n, config.tile_n)

                @pl.loop(0, steps)
                def _block(step: jax.Array) -> None:
                    block = index * steps + step
                    slot, inputs = slot_of(block), pl.ds(step * DEPTH, DEPTH)

                    @pl.when(block >= slots)
                    def _wait() -> None:
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(x_ref.at[mine, inputs], x_smem.at[slot], full.at[slot])
                    for plane in range(planes):
                        plgpu.copy_gmem_to_smem(
                            w_ref.at[plane, outputs, inputs],
                            w_smem.at[slot, plane],
                            full.at[slot],
                            collective_axes="pair" if config.cluster == 2 else None,
                        )

            # A program must not end while the other one of its cluster may still signal to it.
            @pl.loop(tiles * steps - slots, tiles * steps)
            def _drain(block: jax.Array) -> None:
                plgpu.barrier_wait(free.at[slot_of(block)])

    def entry(*refs: Ref) -> None:
        x_ref, w_ref, *residual_refs, out_ref = refs
        residual_ref = residual_refs[0] if residual_refs else None
        out_bytes = config.out_columns * x.dtype.itemsize
        out_swizzle = next(width for width in (128, 64, 32) if out_bytes % width == 0)
        out_block = swizzled(out_swizzle // x.dtype.itemsize, out_swizzle)
        free: Any
        if config.cluster == 2:
            free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=MULTIPLYING, num_barriers=slots)
        else:
            free = plgpu.Barrier(num_arrivals=MULTIPLYING, num_barriers=slots)
        pl.run_scoped(
            lambda *scratch: kernel(x_ref, w_ref, residual_ref, out_ref, scratch),
            plgpu.SMEM((slots, ROWS, DEPTH), x.dtype, transforms=_BLOCK),
            plgpu.SMEM((slots, planes, config.tile_n, DEPTH), x.dtype, transforms=_BLOCK),
            plgpu.SMEM((MULTIPLYING, out_slots, WARPGROUP_ROWS, config.out_columns), x.dtype, transforms=out_block),
            plgpu.Barrier(num_arrivals=1 + planes, num_barriers=slots),
            free,
            collective_axes="warpgroups",
        )

    cluster: dict[str, Any] = {"cluster": (2,), "cluster_names": ("pair",)} if config.cluster == 2 else {}
    run: Any = plgpu.kernel(
        body=entry,
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(programs,),
        grid_names=("programs",),
        num_threads=MULTIPLYING + 1,
        thread_name="warpgroups",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        **cluster,
    )
    result: jax.Array = run(*(array for array in (x, w, residual) if array is not None))
    return result
