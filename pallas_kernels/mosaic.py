"""Helpers that the Mosaic GPU kernels share."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

MULTIPROCESSORS = 132
"""The streaming multiprocessors of an H100 or H200: how many thread blocks of such a kernel run at once."""

_WHOLE: tuple[Any, ...] = ((),) if jax.__version_info__ < (0, 11) else ()
"""The index argument of `load`: required before jax 0.11, refused since."""


def load_rows(ref: Any) -> jax.Array:
    """The rows of a [64, n] reference, to global memory or unswizzled shared memory, in the WGMMA register layout."""
    return plgpu.load(ref, *_WHOLE, layout=plgpu.Layout.WGMMA, optimized=False)


def swizzled(columns: int, width: int) -> tuple[Any, ...]:
    """The transforms of shared memory tiled 8 by `columns`, where a tile's row is the swizzle's `width` in bytes."""
    # In jax 0.11.2 both classes have a method without a body, so type checkers take them for abstract.
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, columns)), swizzle(width)
