"""Normalisation in plain XLA: the reference for the kernel, and the implementation where the kernel does not run."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.norm.record import Norm


def normalise(x: jax.Array, norm: Norm) -> jax.Array:
    """`pallas_kernels.norm.normalise`."""
    wide = x.astype(jnp.float32)
    if norm.kind == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    normed = normed * (norm.weight.astype(jnp.float32) + norm.offset)
    if norm.bias is not None:
        normed = normed + norm.bias.astype(jnp.float32)
    return normed.astype(x.dtype)


def add_and_normalise(
    x: jax.Array, added: jax.Array, norm: Norm, added_norm: Norm | None = None
) -> tuple[jax.Array, jax.Array]:
    """`pallas_kernels.norm.add_and_normalise`."""
    total = x + (added if added_norm is None else normalise(added, added_norm))
    return total, normalise(total, norm)
