"""Normalisation in plain XLA: the reference for the kernel, and what runs where it does not."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """As the public function of this name."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(jnp.float32)).astype(x.dtype)


def add_rms_norm(x: jax.Array, added: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """As the public function of this name."""
    total = x + added
    return total, rms_norm(total, weight, eps)
