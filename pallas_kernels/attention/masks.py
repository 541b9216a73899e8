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
        chunk: a query attends to positions of its own chunk of so many only, the first of which starts at position 0
            (Llama 4); None for no limit.

    Raises:
        ValueError: there is a chunk beside a window, or the attention of a chunk is not causal.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    causal: bool = True
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and (self.window is not None or not self.causal):
            raise ValueError(
                f"attention has chunk={self.chunk} with window={self.window} and causal={self.causal}; a chunk has no "
                "window beside it and is causal"
            )

    @property
    def is_limited(self) -> bool:
        """Whether there are positions before a query that it does not attend to."""
        return self.window is not None or self.chunk is not None

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
        return causal & (keys >= self.first_visible(queries)) if self.is_limited else causal

    def first_visible(self, query: Int[Array, "..."]) -> Int[Array, "..."]:
        """The first position that a query at the given position attends to."""
        if self.chunk is not None:
            return jnp.maximum(query, 0) // self.chunk * self.chunk
        return jnp.zeros_like(query) if self.window is None else jnp.maximum(query - (self.window - 1), 0)
