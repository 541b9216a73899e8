"""Rotary position embedding of query and key heads, in halves as Hugging Face checkpoints pair channels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, float32 [t, head_dim / 2], any attention factor included."""

    cosine: jax.Array
    sine: jax.Array


def turn(first: jax.Array, second: jax.Array, cosine: jax.Array, sine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two halves of a head's channels after the rotation, in float32; the shapes must broadcast."""
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    return first * cosine - second * sine, second * cosine + first * sine


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """`x` [t, ..., head_dim] rotated, in x's dtype."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), rotation.cosine.shape[-1])
    first, second = jnp.split(x, 2, axis=-1)
    turned = turn(first, second, rotation.cosine.reshape(shape), rotation.sine.reshape(shape))
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
