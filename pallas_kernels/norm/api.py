"""The public functions of normalisation."""

from typing import Literal

import jax

from pallas_kernels.devices import Platform
from pallas_kernels.norm import pallas_triton, xla
from pallas_kernels.norm.record import Norm

Implementation = Literal["xla"] | None
"""None takes a kernel on a GPU, for the norms that it computes; only XLA can be differentiated, mapped, partitioned."""


def normalise(
    x: jax.Array, norm: Norm, implementation: Implementation = None, platform: Platform | None = None
) -> jax.Array:
    """`x` [..., n] normalised over its last axis, in float32 and rounded once to x's dtype.

    `platform` is what computes, None for JAX's default backend.
    """
    return (pallas_triton if _by_kernel(norm, implementation, platform) else xla).normalise(x, norm)


def add_and_normalise(
    x: jax.Array,
    added: jax.Array,
    norm: Norm,
    implementation: Implementation = None,
    platform: Platform | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`x + added`, and that normalised; by a kernel both at once. x and added [..., n] of one dtype."""
    return (pallas_triton if _by_kernel(norm, implementation, platform) else xla).add_and_normalise(x, added, norm)


def _by_kernel(norm: Norm, implementation: Implementation, platform: Platform | None) -> bool:
    return implementation is None and (platform or Platform.default()).on_gpu and norm.in_kernels
