"""The public functions of normalisation, and the choice between their implementations."""

from typing import Literal

from jaxtyping import Array, Float

from pallas_kernels.devices import Platform
from pallas_kernels.norm import pallas_triton, xla
from pallas_kernels.norm.record import Norm

Implementation = Literal["xla"] | None
"""None takes the kernel on a GPU where it can compute the norm; only XLA can be differentiated, mapped and partitioned.
"""


def normalise(
    x: Float[Array, "*lead n"], norm: Norm, implementation: Implementation = None, platform: Platform | None = None
) -> Float[Array, "*lead n"]:
    """`x` normalised over its last axis, computed in float32 and rounded once to x's dtype.

    `platform` is the one that computes it, None for JAX's default backend.
    """
    return (pallas_triton if _by_kernel(norm, implementation, platform) else xla).normalise(x, norm)


def add_and_normalise(
    x: Float[Array, "*lead n"],
    added: Float[Array, "*lead n"],
    norm: Norm,
    implementation: Implementation = None,
    platform: Platform | None = None,
    *,
    added_norm: Norm | None = None,
) -> tuple[Float[Array, "*lead n"], Float[Array, "*lead n"]]:
    """`x + added`, and that sum normalised, in one kernel where there is one; both operands have one dtype.

    With `added_norm`, `added` is normalised by it, and rounded, before it is added.
    """
    if added_norm is not None and not added_norm.in_kernels:
        added, added_norm = normalise(added, added_norm, implementation, platform), None
    by = pallas_triton if _by_kernel(norm, implementation, platform) else xla
    return by.add_and_normalise(x, added, norm, added_norm)


def _by_kernel(norm: Norm, implementation: Implementation, platform: Platform | None) -> bool:
    return implementation is None and (platform or Platform.default()).on_gpu and norm.in_kernels
