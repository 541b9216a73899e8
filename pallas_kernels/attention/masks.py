"""How attention scores are computed and masked, shared by the reference and every kernel."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""The score of a masked position: finite, so that a fully masked block produces no NaN."""

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Scoring:
    """How a query scores keys, and which keys it attends to.

    Attributes:
        scale: the factor on the product of query and key.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2); None for no cap.
        window: a query attends to its own position and the window - 1 before it (Mistral); None for no limit.
        causal: whether a query attends to no later position. If False, a window reaches as far after it as before it.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    causal: bool = True

    def scores(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scores, before any mask, from the products of queries and keys."""
        scaled = products * self.scale
        return scaled if self.soft_cap is None else self.soft_cap * jnp.tanh(scaled / self.soft_cap)

    def log2_scores(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        """`scores` times log2(e), for kernels that compute exp(score) as exp2, which is one instruction."""
        return products * (self.scale * LOG2_E) if self.soft_cap is None else self.scores(products) * LOG2_E

    def visible(self, queries: Int[Array, "..."], keys: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether a query at one position attends to a key at another; the two broadcast."""
        if not self.causal:
            near = True if self.window is None else jnp.abs(keys - queries) < self.window
            return jnp.broadcast_to(near, jnp.broadcast_shapes(queries.shape, keys.shape))
        causal = keys <= queries
        return causal if self.window is None else causal & (keys > queries - self.window)

    def first_visible(self, query: Int[Array, "..."]) -> Int[Array, "..."]:
        """The first position that a query at the given position attends to."""
        return jnp.zeros_like(query) if self.window is None else jnp.maximum(query - (self.window - 1), 0)
