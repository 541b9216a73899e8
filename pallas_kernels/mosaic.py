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
