"""What the kernels on Mosaic GPU share."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

MULTIPROCESSORS = 132
"""Of an H100 or H200: programs that run at once."""

_WHOLE: tuple[Any, ...] = ((),) if jax.__version_info__ < (0, 11) else ()
"""Before jax 0.11 an index had to follow the reference; since then it may not."""


def load_rows(ref: Any) -> jax.Array:
    """A [64, n] reference to global memory, or to shared memory as it is, in the layout of a warpgroup's products."""
    return plgpu.load(ref, *_WHOLE, layout=plgpu.Layout.WGMMA, optimized=False)


def swizzled(columns: int, width: int) -> tuple[Any, ...]:
    """The transforms of shared memory in blocks of 8 rows by `columns`, which have the swizzle's `width` in bytes."""
    # To type checkers both classes of jax 0.11.2 are abstract, with a method that has no body.
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, columns)), swizzle(width)
