"""Products of many rows on Hopper as a Pallas kernel on Mosaic GPU, with SwiGLU or a residual in its epilogue.

It is a warp-specialised, persistent matmul, as in CUTLASS: in each program one warpgroup copies blocks of both operands
into a ring buffer in shared memory, and two others multiply them, 64 rows each. The two programs of a cluster work on
neighbouring rows, and each reads half of the weights for both. A program computes several tiles, and copies blocks of
the next one while it writes the last.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.tiles import Wide
from pallas_kernels.mosaic import MULTIPROCESSORS, load_rows, swizzled

Ref = Any
WARPGROUP_ROWS = 64
MULTIPLYING = 2
ROWS = WARPGROUP_ROWS * MULTIPLYING
"""The rows of a tile."""
DEPTH = 64
"""The inputs of a block: 128 bytes, the widest swizzle."""
OUT_COLUMNS = 64
"""How many outputs are written at once."""

_BLOCK = swizzled(DEPTH, 128)


def product(
    x: jax.Array, w: jax.Array, residual: jax.Array | None, config: Wide, *, interpret: Any = None
) -> jax.Array:
    """`linear` for weights w [1, n, k], `gated_linear` for [2, n, k]: [m, n] in x's dtype, which must have 16 bits.

    The sizes must be such that `config.takes` them. `interpret` is for Mosaic GPU's interpreter, which jax has since
    0.11.2.
    """
    (m, k), (planes, n, _) = x.shape, w.shape
    if residual is not None and m % (ROWS * config.cluster):
        # Copies of x and w give zeros for rows past the end, but the plain loads of a residual do not.
        return (
            product(x, w, None, config, interpret=interpret).astype(jnp.float32) + residual.astype(jnp.float32)
        ).astype(x.dtype)
    rows, columns = pl.cdiv(m, ROWS * config.cluster), n // config.tile_n
    programs = min(MULTIPROCESSORS // config.cluster, rows * columns)
    sizes = _Sizes(planes, rows, columns, k // DEPTH, programs, x.dtype, config)

    def entry(*refs: Ref) -> None:
        x_ref, w_ref, *residual_refs, out_ref = refs
        operands = _Operands(x_ref, w_ref, residual_refs[0] if residual_refs else None, out_ref)
        pl.run_scoped(
            lambda *shared: _Program.begin(sizes, operands, _Shared(*shared)).run(),
            *_Shared.of(sizes),
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


@dataclass(frozen=True)
class _Sizes:
    """The sizes for which the kernel is compiled.

    Attributes:
        planes: 2 for a gated product, else 1.
        rows: the number of rows of tiles, counting a cluster's as one.
        columns: the number of columns of tiles.
        steps: the number of blocks of inputs.
        programs: the number of programs, counting a cluster's as one.
        dtype: the dtype of the operands and the result.
        config: how the product is divided.
    """

    planes: int
    rows: int
    columns: int
    steps: int
    programs: int
    dtype: jnp.dtype
    config: Wide

    @property
    def out_slots(self) -> int:
        """How many blocks of results can be in shared memory while they are written."""
        return min(2, self.config.tile_n // self.config.out_columns)

    def slot_of(self, block: jax.Array) -> jax.Array:
        """The slot of a block of inputs in the ring buffer."""
        return lax.rem(block, jnp.int32(self.config.slots))

    def tile_of(self, index: jax.Array, program: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The row and the column of a tile: column by column within a band of rows, for reuse in the L2 cache."""
        band_rows, columns = self.config.band, self.columns
        linear = index * self.programs + program
        band, within = lax.div(linear, band_rows * columns), lax.rem(linear, band_rows * columns)
        height = jnp.minimum(self.rows - band * band_rows, band_rows)
        return band * band_rows + lax.rem(within, height), lax.div(within, height)


class _Operands(NamedTuple):
    """References to global memory: the arguments of `product` and its result."""

    x: Ref
    w: Ref
    residual: Ref | None
    out: Ref


class _Shared(NamedTuple):
    """Buffers in shared memory, and the barriers that signal that a slot has been filled or can be overwritten.

    Rows are [slots, ROWS, DEPTH], weights [slots, planes, tile_n, DEPTH], results [MULTIPLYING, out_slots,
    WARPGROUP_ROWS, out_columns].
    """

    x: Ref
    w: Ref
    out: Ref
    full: Ref
    free: Ref

    @classmethod
    def of(cls, sizes: _Sizes) -> "_Shared":
        """The shapes and kinds of the buffers and barriers to allocate."""
        config, dtype, slots = sizes.config, sizes.dtype, sizes.config.slots
        out_bytes = config.out_columns * dtype.itemsize
        out_swizzle = next(width for width in (128, 64, 32) if out_bytes % width == 0)
        out_block = swizzled(out_swizzle // dtype.itemsize, out_swizzle)
        free: Any
        if config.cluster == 2:
            free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=MULTIPLYING, num_barriers=slots)
        else:
            free = plgpu.Barrier(num_arrivals=MULTIPLYING, num_barriers=slots)
        out_shape = (MULTIPLYING, sizes.out_slots, WARPGROUP_ROWS, config.out_columns)
        return cls(
            x=plgpu.SMEM((slots, ROWS, DEPTH), dtype, transforms=_BLOCK),
            w=plgpu.SMEM((slots, sizes.planes, config.tile_n, DEPTH), dtype, transforms=_BLOCK),
            out=plgpu.SMEM(out_shape, dtype, transforms=out_block),
            full=plgpu.Barrier(num_arrivals=1 + sizes.planes, num_barriers=slots),
            free=free,
        )


@dataclass(frozen=True)
class _Program:
    """The work of one warpgroup of one program."""

    sizes: _Sizes
    operands: _Operands
    shared: _Shared
    program: jax.Array
    warpgroup: jax.Array
    member: jax.Array | int
    tiles: jax.Array

    @classmethod
    def begin(cls, sizes: _Sizes, operands: _Operands, shared: _Shared) -> "_Program":
        """The work of the warpgroup that executes this."""
        program, warpgroup = lax.axis_index("programs"), lax.axis_index("warpgroups")
        member = lax.axis_index("pair") if sizes.config.cluster == 2 else 0
        tiles = lax.div(sizes.rows * sizes.columns - program + sizes.programs - 1, sizes.programs)
        return cls(sizes, operands, shared, program, warpgroup, member, tiles)

    def run(self) -> None:
        """Multiply the program's tiles, or copy the operands for the warpgroups that do."""

        @pl.when(self.warpgroup < MULTIPLYING)
        def _multiply() -> None:
            plgpu.set_max_registers(232, action="increase")
            shape = (WARPGROUP_ROWS, self.sizes.config.tile_n)

            @pl.loop(0, self.tiles)
            def _tile(index: jax.Array) -> None:
                sums = [plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * self.sizes.planes
                results = pl.run_scoped(lambda *refs: self._multiply(index, *refs), *sums)
                self._write(results, *self.sizes.tile_of(index, self.program))

            plgpu.wait_smem_to_gmem(0)

        @pl.when(self.warpgroup == MULTIPLYING)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            pl.loop(0, self.tiles)(self._copy_tile)
            self._see_all_free()

    def _multiply(self, index: jax.Array, *sum_refs: Ref) -> list[jax.Array]:
        """The float32 sums of this warpgroup's rows, one for each plane."""
        sizes, shared = self.sizes, self.shared

        @pl.loop(0, sizes.steps)
        def _block(step: jax.Array) -> None:
            block = index * sizes.steps + step
            slot = sizes.slot_of(block)
            plgpu.barrier_wait(shared.full.at[slot])
            mine = shared.x.at[slot, pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
            for plane, sum_ref in enumerate(sum_refs):
                plgpu.wgmma(sum_ref, mine, shared.w.at[slot, plane].transpose((1, 0)))
            plgpu.wgmma_wait(sizes.planes)  # the products still running read this block, and none reads the one before

            @pl.when(step > 0)
            def _release() -> None:
                plgpu.barrier_arrive(shared.free.at[sizes.slot_of(block - 1)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(shared.free.at[sizes.slot_of((index + 1) * sizes.steps - 1)])
        return [sum_ref[...] for sum_ref in sum_refs]

    def _write(self, sums: list[jax.Array], row: jax.Array, column: jax.Array) -> None:
        """Gate the sums or add the residual, and write this warpgroup's rows of a tile."""
        config, operands, out_slots = self.sizes.config, self.operands, self.sizes.out_slots
        mine = pl.ds((row * config.cluster + self.member) * ROWS + self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        result = sums[0] if len(sums) == 1 else sums[0] / (1.0 + jnp.exp(-sums[0])) * sums[1]
        for part, first in enumerate(range(0, config.tile_n, config.out_columns)):
            values = result[:, first : first + config.out_columns]
            outputs = pl.ds(column * config.tile_n + first, config.out_columns)
            if operands.residual is not None:
                values += load_rows(operands.residual.at[mine, outputs]).astype(jnp.float32)
            place = self.shared.out.at[self.warpgroup, part % out_slots]
            plgpu.wait_smem_to_gmem(out_slots - 1, wait_read_only=True)
            place[...] = values.astype(self.sizes.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, operands.out.at[mine, outputs])

    def _copy_tile(self, index: jax.Array) -> None:
        """Copy a tile's rows and weights block by block, each as soon as its slot is free."""
        sizes, shared, config = self.sizes, self.shared, self.sizes.config
        row, column = sizes.tile_of(index, self.program)
        mine = pl.ds((row * config.cluster + self.member) * ROWS, ROWS)
        outputs = pl.ds(column * config.tile_n, config.tile_n)

        @pl.loop(0, sizes.steps)
        def _block(step: jax.Array) -> None:
            block = index * sizes.steps + step
            slot, inputs = sizes.slot_of(block), pl.ds(step * DEPTH, DEPTH)

            @pl.when(block >= config.slots)
            def _wait() -> None:
                plgpu.barrier_wait(shared.free.at[slot])

            plgpu.copy_gmem_to_smem(self.operands.x.at[mine, inputs], shared.x.at[slot], shared.full.at[slot])
            for plane in range(sizes.planes):
                plgpu.copy_gmem_to_smem(
                    self.operands.w.at[plane, outputs, inputs],
                    shared.w.at[slot, plane],
                    shared.full.at[slot],
                    collective_axes="pair" if config.cluster == 2 else None,
                )

    def _see_all_free(self) -> None:
        """Wait for all signals: a program must not end while the other one of its cluster may still signal to it."""
        steps = self.sizes.steps

        @pl.loop(self.tiles * steps - self.sizes.config.slots, self.tiles * steps)
        def _see_free(block: jax.Array) -> None:
            plgpu.barrier_wait(self.shared.free.at[self.sizes.slot_of(block)])
