"""Normalisation of query and key heads over their channels, before they are rotated.

It keeps attention's scores small (Dehghani et al. 2023, arXiv:2302.05442).
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.devices import Platform
from pallas_kernels.norm import Norm, normalise


class HeadNorms(NamedTuple):
    """The normalisation of every query head, and that of every key head."""

    queries: Norm
    keys: Norm

    @property
    def in_kernels(self) -> bool:
        """Whether attention's kernels can compute both; XLA can compute every norm."""
        return self.queries.in_kernels and self.keys.in_kernels


def normalise_queries_and_keys(
    qkv: Float[Array, "t h qkv d"],
    norms: HeadNorms,
    implementation: Literal["xla"] | None = None,
    platform: Platform | None = None,
) -> Float[Array, "t h qkv d"]:
    """Fused projections with their queries and keys normalised, as `pallas_kernels.norm.normalise` computes it."""
    queries = normalise(qkv[:, :, :-2], norms.queries, implementation, platform)
    keys = normalise(qkv[:, :, -2:-1], norms.keys, implementation, platform)
    return jnp.concatenate([queries, keys, qkv[:, :, -1:]], axis=2)
