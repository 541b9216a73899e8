"""Queries that grow with their position (Nakanishi 2025, arXiv:2501.19399)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


class GrowingScale(NamedTuple):
    """A factor on queries, 1 + beta log(1 + n), where n is how many whole spans of tokens the sequence has so far.

    Attributes:
        beta: how fast queries grow.
        span: the tokens of a span.
        rounded: whether the factor is rounded to the queries' dtype, as Ministral 3's is and Llama 4's is not.
    """

    beta: float
    span: int
    rounded: bool = False

    def scaled(self, qkv: Float[Array, "t h qkv d"], so_far: Int32[Array, " t"]) -> Float[Array, "t h qkv d"]:
        """Fused projections whose queries are scaled; `so_far` are the tokens that are counted for each of them."""
        scale = 1 + self.beta * jnp.log1p((so_far // self.span).astype(jnp.float32))
        scale = scale.astype(qkv.dtype) if self.rounded else scale
        queries = qkv[:, :, :-2] * scale[:, None, None, None]
        return jnp.concatenate([queries.astype(qkv.dtype), qkv[:, :, -2:]], axis=2)
