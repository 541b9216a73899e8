"""The public functions: products of activations with weights that are stored output-first.

Axes: m rows, n outputs, k inputs. On a GPU the kernel takes the shapes for which `tuned.py` says that it is faster than
XLA; everything else, and every other backend, is XLA's.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.devices import Platform
from pallas_kernels.matmul import mosaic_hopper, pallas_triton, tuned, xla
from pallas_kernels.matmul.activations import Activation
from pallas_kernels.norm import Norm, normalise
from pallas_kernels.weights import QuantizedWeight

Implementation = tuned.Config | tuned.Wide | Literal["measured", "xla"]
"""Which code computes a product: a kernel of given sizes, XLA, or what was measured to be faster.

Only what XLA computes alone, the normalisation included, can be differentiated, mapped and partitioned.
"""


def linear(
    x: jax.Array,
    w: jax.Array | QuantizedWeight,
    *,
    residual: jax.Array | None = None,
    norm: Norm | None = None,
    implementation: Implementation = "measured",
    platform: Platform | None = None,
) -> jax.Array:
    """`x @ w.T + residual`, accumulated and added in float32, rounded once.

    Args:
        x: [m, k].
        w: [n, k], of x's dtype or of one that x is rounded to; a quantised weight is XLA's.
        residual: [m, n]; None for none.
        norm: how x is normalised first, over k channels; None for not at all.
        implementation: a kernel of given sizes is interpreted where there is no GPU, but for Hopper's own.
        platform: what computes; None for JAX's default backend.

    Returns:
        [m, n] in x's dtype.

    Raises:
        ValueError: the shapes do not fit each other, or a kernel was asked for that cannot take them.
    """
    shape = (x.shape[0], w.shape[0])
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or (residual is not None and residual.shape != shape):
        added = "" if residual is None else f" plus residual {residual.shape}"
        raise ValueError(f"x {x.shape} times w {w.shape}{added}: want x [m, k], w [n, k] and residual [m, n]")
    platform = platform or Platform.default()
    config = _config(implementation, platform, x, w, planes=1)
    x, norm = _normalised(x, norm, config, implementation, platform)
    if config is None:
        return xla.linear(x, w, residual=residual, platform=platform)
    return _by_kernel(x, w, residual, norm, config, platform)


def adds_residual(x: jax.Array, w: jax.Array | QuantizedWeight, platform: Platform | None = None) -> bool:
    """Whether `linear` adds a residual at no cost: in its kernel, or where XLA fuses what follows a product.

    Only on a GPU may a sum be a kernel of its own, which the next normalisation spares who leaves the sum to it.
    """
    platform = platform or Platform.default()
    return not platform.on_gpu or _config("measured", platform, x, w, planes=1) is not None


def gated_linear(
    x: jax.Array,
    w: jax.Array | QuantizedWeight,
    *,
    norm: Norm | None = None,
    activation: Activation = "silu",
    implementation: Implementation = "measured",
    platform: Platform | None = None,
) -> jax.Array:
    """`activation(x @ w[0].T) * (x @ w[1].T)` (Shazeer 2020, arXiv:2002.05202), float32 throughout, rounded once.

    Args:
        x: [m, k].
        w: [2, n, k], the gate's weights and the others; as in `linear`.
        norm: as in `linear`.
        activation: of the gate; what is not SiLU is XLA's.
        implementation: as in `linear`.
        platform: as in `linear`.

    Returns:
        [m, n] in x's dtype.

    Raises:
        ValueError: as in `linear`.
    """
    if x.ndim != 2 or w.ndim != 3 or w.shape[0] != 2 or x.shape[1] != w.shape[2]:
        raise ValueError(f"x {x.shape} times w {w.shape}: want x [m, k] and w [2, n, k]")
    platform = platform or Platform.default()
    config = _config(implementation, platform, x, w, planes=2, possible=activation == "silu")
    x, norm = _normalised(x, norm, config, implementation, platform)
    if config is None:
        return xla.gated_linear(x, w, activation, platform)
    return _by_kernel(x, w, None, norm, config, platform)


def _by_kernel(
    x: jax.Array,
    w: Any,
    residual: jax.Array | None,
    norm: Norm | None,
    config: tuned.Config | tuned.Wide,
    platform: Platform,
) -> jax.Array:
    """The product with an array w [n, k] or [2, n, k], which is all that `_config` has kernels for."""
    planes = w if w.ndim == 3 else w[None]
    if isinstance(config, tuned.Wide):
        return mosaic_hopper.product(x, planes, residual, config)
    return pallas_triton.product(x, planes, residual, norm, config, interpret=not platform.on_gpu)


def _normalised(
    x: jax.Array,
    norm: Norm | None,
    config: tuned.Config | tuned.Wide | None,
    implementation: Implementation,
    platform: Platform,
) -> tuple[jax.Array, Norm | None]:
    """x, and the normalisation that is left to the kernel."""
    # The kernel rounds rows before it divides by their size, which float16 may not survive.
    if norm is None or (config is not None and config.normalises and norm.in_kernels and x.dtype == jnp.bfloat16):
        return x, norm
    return normalise(x, norm, "xla" if implementation == "xla" else None, platform), None


def _config(
    implementation: Implementation,
    platform: Platform,
    x: jax.Array,
    w: jax.Array | QuantizedWeight,
    *,
    planes: int,
    possible: bool = True,
) -> tuned.Config | tuned.Wide | None:
    """The sizes of the kernel that takes this product of `planes` matrices, or None where XLA does."""
    n, k = w.shape[-2:]
    possible = possible and x.dtype == w.dtype and x.dtype in (jnp.bfloat16, jnp.float16)
    if isinstance(implementation, tuned.Config | tuned.Wide):
        if not possible or not implementation.takes(x.shape[0], n, k):
            raise ValueError(f"{implementation} does not take x {x.shape} {x.dtype} and w {w.shape} {w.dtype}")
        return implementation
    if implementation == "xla" or not possible:
        return None
    config = tuned.choose(platform.gpu, x.shape[0], n, k, planes == 2)
    return config if config is not None and config.takes(x.shape[0], n, k) else None
