"""The public functions of normalisation."""

from typing import Literal

import jax

from pallas_kernels.norm import pallas_triton, xla


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, implementation: Literal["xla"] | None = None) -> jax.Array:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467), in float32.

    x [..., n], weight [n]; the result has x's shape and dtype. A GPU runs a kernel unless `implementation` is "xla",
    which alone can be differentiated, mapped and partitioned.
    """
    if implementation == "xla" or jax.default_backend() != "gpu":
        return xla.rms_norm(x, weight, eps)
    return pallas_triton.rms_norm(x, weight, eps)


def add_rms_norm(
    x: jax.Array, added: jax.Array, weight: jax.Array, eps: float, implementation: Literal["xla"] | None = None
) -> tuple[jax.Array, jax.Array]:
    """`x + added`, and its `rms_norm`; on a GPU both by one kernel. x and added [..., n] of one dtype, weight [n]."""
    if implementation == "xla" or jax.default_backend() != "gpu":
        return xla.add_rms_norm(x, added, weight, eps)
    return pallas_triton.add_rms_norm(x, added, weight, eps)
