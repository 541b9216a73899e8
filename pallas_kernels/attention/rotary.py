"""Rotary position embedding of query and key heads; a pair is a channel of either half, as in Hugging Face models."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


class Rotation(NamedTuple):
    """The cosine and sine of each token's angles, one for each pair of channels, multiplied by any attention factor.

    It rotates the first `channels` channels of a head and leaves the others, if there are any, unchanged.
    """

    cosine: Float32[Array, "t pairs"]
    sine: Float32[Array, "t pairs"]

    @property
    def channels(self) -> int:
        """How many channels of a head are rotated."""
        return 2 * self.cosine.shape[-1]


def turn(
    first: Float[Array, "..."], second: Float[Array, "..."], cosine: Float32[Array, "..."], sine: Float32[Array, "..."]
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """The two halves of a head's channels after the rotation, in float32; the shapes must broadcast."""
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    return first * cosine - second * sine, second * cosine + first * sine


def rotate(x: Float[Array, "t *lead d"], rotation: Rotation) -> Float[Array, "t *lead d"]:
    """`x` rotated, in x's dtype."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), rotation.cosine.shape[-1])
    turning, still = x[..., : rotation.channels], x[..., rotation.channels :]
    first, second = jnp.split(turning, 2, axis=-1)
    turned = turn(first, second, rotation.cosine.reshape(shape), rotation.sine.reshape(shape))
    parts = turned if still.shape[-1] == 0 else (*turned, still.astype(jnp.float32))
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def rotate_queries_and_keys(qkv: Float[Array, "t h qkv d"], rotation: Rotation | None) -> Float[Array, "t h qkv d"]:
    """Fused projections with their queries and keys rotated; unchanged if the rotation is None."""
    if rotation is None:
        return qkv
    return jnp.concatenate([rotate(qkv[:, :, :-1], rotation), qkv[:, :, -1:]], axis=2)
