"""What a kind of attention does to its scores; shared by the reference and every kernel."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a masked position: finite, so that a fully masked block gives no NaN."""

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Scoring:
    """How a query scores the keys it may see.

    Attributes:
        scale: factor on the product of query and key.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2); None for none.
        window: a query sees its own position and the window - 1 before it (Mistral); None for all before it.
        causal: whether a query sees nothing behind its position. If not, a window reaches as far behind as before it.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    causal: bool = True

    def scores(self, products: jax.Array) -> jax.Array:
        """Scores before any mask, of float32 products."""
        scaled = products * self.scale
        return scaled if self.soft_cap is None else self.soft_cap * jnp.tanh(scaled / self.soft_cap)

    def log2_scores(self, products: jax.Array) -> jax.Array:
        """`scores` in units whose power of two is the exponential: kernels compute exp2, which is one instruction."""
        return products * (self.scale * LOG2_E) if self.soft_cap is None else self.scores(products) * LOG2_E

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Whether the query at one position may see the key at another; broadcasts."""
        if not self.causal:
            near = True if self.window is None else jnp.abs(keys - queries) < self.window
            return jnp.broadcast_to(near, jnp.broadcast_shapes(queries.shape, keys.shape))
        causal = keys <= queries
        return causal if self.window is None else causal & (keys > queries - self.window)

    def first_visible(self, query: jax.Array) -> jax.Array:
        """The first position that the query at a position sees."""
        return jnp.zeros_like(query) if self.window is None else jnp.maximum(query - (self.window - 1), 0)
