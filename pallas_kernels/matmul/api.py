"""The public functions for products of activations with weights, which are stored output-first.

On a GPU a kernel computes the products for which `tuned.py` says that it is faster than XLA; XLA computes all others,
and everything on other backends.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.devices import Platform
from pallas_kernels.matmul import mosaic_hopper, pallas_triton, tuned, xla
from pallas_kernels.matmul.activations import Activation
from pallas_kernels.matmul.tiles import Config, Wide
from pallas_kernels.norm import Norm, normalise
from pallas_kernels.weights import QuantizedWeight

Implementation = Config | Wide | Literal["measured", "xla"]
"""What computes a product: a kernel with the given tile sizes, XLA, or whichever of them is known or expected to be
faster.

Only "xla", under which XLA also computes the normalisation, can be differentiated, mapped and partitioned.
"""


def linear(
    x: Float[Array, "m k"],
    w: Float[Array, "n k"] | QuantizedWeight,
    *,
    residual: Float[Array, "m n"] | None = None,
    norm: Norm | None = None,
    implementation: Implementation = "measured",
    platform: Platform | None = None,
) -> Float[Array, "m n"]:
    """`x @ w.T + residual` in x's dtype, accumulated and added in float32 and rounded once.

    Args:
        x: the activations.
        w: the weight; x is rounded to its dtype where the two differ. XLA computes products with quantised weights.
        residual: added to the product; None for none.
        norm: the normalisation applied to x first, over its k channels; None for none.
        implementation: what computes it. Without a GPU a Triton kernel is interpreted, and a Hopper kernel is refused.
        platform: the one that computes it; None for JAX's default backend.

    Raises:
        ValueError: the shapes do not match, or the given kernel does not support them.
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


def adds_residual(
    x: Float[Array, "m k"], w: Float[Array, "n k"] | QuantizedWeight, platform: Platform | None = None
) -> bool:
    """Whether `linear` adds a residual at no cost: in its kernel, or in an XLA fusion.

    On a GPU, XLA's products are library calls and the sum would be a kernel of its own; left to the next normalisation,
    it costs nothing.
    """
    platform = platform or Platform.default()
    return not platform.on_gpu or _config("measured", platform, x, w, planes=1) is not None


def gated_linear(
    x: Float[Array, "m k"],
    w: Float[Array, "2 n k"] | QuantizedWeight,
    *,
    norm: Norm | None = None,
    activation: Activation = "silu",
    implementation: Implementation = "measured",
    platform: Platform | None = None,
) -> Float[Array, "m n"]:
    """`activation(x @ w[0].T) * (x @ w[1].T)` (Shazeer 2020, arXiv:2002.05202) in x's dtype, computed in float32.

    Args:
        x: the activations.
        w: the weights of the gate and those that it gates; otherwise as in `linear`.
        norm: as in `linear`.
        activation: the gate's; XLA computes all but SiLU.
        implementation: as in `linear`.
        platform: as in `linear`.

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
    config: Config | Wide,
    platform: Platform,
) -> jax.Array:
    """The kernel's product with an array w [n, k] or [2, n, k]; `_config` chooses no kernel for other weights."""
    planes = w if w.ndim == 3 else w[None]
    if isinstance(config, Wide):
        return mosaic_hopper.product(x, planes, residual, config)
    return pallas_triton.product(x, planes, residual, norm, config, interpret=not platform.on_gpu)


def _normalised(
    x: jax.Array,
    norm: Norm | None,
    config: Config | Wide | None,
    implementation: Implementation,
    platform: Platform,
) -> tuple[jax.Array, Norm | None]:
    """x, normalised unless the kernel can do it, and the normalisation that is left to the kernel."""
    # The kernel rounds rows before it divides by their root mean square, and float16 may overflow.
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
) -> Config | Wide | None:
    """The tile sizes of the kernel that computes this product of `planes` matrices; None if XLA computes it."""
    n, k = w.shape[-2:]
    possible = possible and x.dtype == w.dtype and x.dtype in (jnp.bfloat16, jnp.float16)
    if isinstance(implementation, Config | Wide):
        if not possible or not implementation.takes(x.shape[0], n, k):
            raise ValueError(f"{implementation} does not take x {x.shape} {x.dtype} and w {w.shape} {w.dtype}")
        return implementation
    if implementation == "xla" or not possible:
        return None
    config = tuned.choose(platform, x.shape[0], n, k, planes == 2)
    return config if config is not None and config.takes(x.shape[0], n, k) else None
