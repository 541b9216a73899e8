"""One vector for a whole sequence, made of the hidden states of its tokens."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

How = Literal["cls", "last", "mean"]
"""The first token's hidden state, the last one's, or the mean of all."""


class Pooling(NamedTuple):
    """How a model makes embeddings of hidden states.

    Attributes:
        how: which hidden states count.
        normalize: whether an embedding is then divided by its L2 norm.
    """

    how: How = "last"
    normalize: bool = True


def last_token(rows: Float[Array, "b s embed"], lengths: Int32[Array, " b"]) -> Float[Array, "b embed"]:
    """The hidden state of each sequence's last token that is no padding."""
    return rows[jnp.arange(rows.shape[0]), jnp.maximum(lengths - 1, 0)]


def pooled(rows: Float[Array, "b s embed"], lengths: Int32[Array, " b"], how: How) -> Float32[Array, "b embed"]:
    """The vector of each sequence, of which the first `lengths` tokens are no padding."""
    rows = rows.astype(jnp.float32)
    if how == "cls":
        return rows[:, 0]
    if how == "last":
        return last_token(rows, lengths)
    real = jnp.arange(rows.shape[1]) < lengths[:, None]
    # Padding may hold values that are not finite, which a weight of 0 does not remove.
    total = jnp.where(real[:, :, None], rows, 0).sum(1)
    return total / jnp.maximum(lengths, 1)[:, None]
