"""The running softmax of attention over blocks of keys, used by XLA and by the Triton kernels."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from pallas_kernels.attention.masks import MASKED


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RunningSoftmax:
    """A softmax over the keys added so far (Milakov and Gimelshein 2018, arXiv:1805.02867), of q queries each.

    Attributes:
        maximum: [..., q], the largest score.
        total: [..., q], the sum of the weights.
        weighted: [..., q, d], the weighted sum of the values.
        exp: the function from a score to its weight: `jnp.exp`, or `jnp.exp2` for `Scoring.log2_scores`; static.
    """

    maximum: jax.Array
    total: jax.Array
    weighted: jax.Array
    exp: Callable[[jax.Array], jax.Array] = field(metadata={"static": True})

    @classmethod
    def empty(cls, queries: tuple[int, ...], dim: int, exp: Callable[[jax.Array], jax.Array]) -> "RunningSoftmax":
        """The softmax before any key, for queries of the shape `queries` and values of `dim` channels."""
        return cls(
            jnp.full(queries, MASKED, jnp.float32),
            jnp.zeros(queries, jnp.float32),
            jnp.zeros((*queries, dim), jnp.float32),
            exp,
        )

    def add(self, scores: jax.Array, weigh: Callable[[jax.Array], jax.Array]) -> "RunningSoftmax":
        """The softmax after a block of s keys with `scores` [..., q, s].

        `weigh` takes weights of that shape to the weighted sum [..., q, d] of the block's values.
        """
        scaled = self._rescaled(jnp.max(scores, axis=-1))
        weights = self.exp(scores - scaled.maximum[..., None])
        weighted = scaled.weighted + weigh(weights)
        return replace(scaled, total=scaled.total + jnp.sum(weights, axis=-1), weighted=weighted)

    def add_one(self, scores: jax.Array, value: jax.Array, seen: jax.Array | None = None) -> "RunningSoftmax":
        """The softmax after one key with `scores` [..., q] and the `value` [d].

        `seen` [..., q] says which queries attend to the key; None for all. Each must attend to some key before or after
        this one, because until then a masked score is its largest.
        """
        scores = scores if seen is None else jnp.where(seen, scores, MASKED)
        scaled = self._rescaled(scores)
        weight = self.exp(scores - scaled.maximum)
        added = weight[..., None] * value.astype(jnp.float32)[None, :]
        weighted = scaled.weighted + (added if seen is None else jnp.where(seen[..., None], added, 0))
        return replace(scaled, total=scaled.total + weight, weighted=weighted)

    def add_sinks(self, scores: jax.Array) -> "RunningSoftmax":
        """The softmax after attention sinks (gpt-oss), which have `scores` [..., q] and no value."""
        scaled = self._rescaled(scores)
        return replace(scaled, total=scaled.total + self.exp(scores - scaled.maximum))

    def _rescaled(self, scores: jax.Array) -> "RunningSoftmax":
        """The same softmax with its weights relative to the largest score, `scores` [..., q] included."""
        maximum = jnp.maximum(self.maximum, scores)
        correction = self.exp(self.maximum - maximum)
        return replace(
            self, maximum=maximum, total=self.total * correction, weighted=self.weighted * correction[..., None]
        )

    def result(self) -> jax.Array:
        """The weighted mean [..., q, d] of the values; 0 if no key was added."""
        return self.weighted / jnp.where(self.total > 0, self.total, 1.0)[..., None]
