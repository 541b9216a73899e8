"""Rotary position embedding of query and key heads, in halves as Hugging Face checkpoints pair channels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, float32 [t, channels / 2], any attention factor included.

    It turns the first `channels` channels of a head; the others, if there are any, stay as they are.
    """

    cosine: jax.Array
    sine: jax.Array

    @property
    def channels(self) -> int:
        """How many channels of a head are turned."""
        return 2 * self.cosine.shape[-1]


def turn(first: jax.Array, second: jax.Array, cosine: jax.Array, sine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two halves of a head's channels after the rotation, in float32; the shapes must broadcast."""
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    return first * cosine - second * sine, second * cosine + first * sine


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """`x` [t, ..., head_dim] rotated, in x's dtype."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), rotation.cosine.shape[-1])
    turning, still = x[..., : rotation.channels], x[..., rotation.channels :]
    first, second = jnp.split(turning, 2, axis=-1)
    turned = turn(first, second, rotation.cosine.reshape(shape), rotation.sine.reshape(shape))
    parts = turned if still.shape[-1] == 0 else (*turned, still.astype(jnp.float32))
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def rotate_queries_and_keys(qkv: jax.Array, rotation: Rotation | None) -> jax.Array:
    """Projections [t, h, g + 2, d] whose queries and keys are rotated; as they are where rotation is None."""
    if rotation is None:
        return qkv
    return jnp.concatenate([rotate(qkv[:, :, :-1], rotation), qkv[:, :, -1:]], axis=2)
