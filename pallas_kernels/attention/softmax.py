"""The running softmax that attention in blocks of keys is made of, in XLA and in the kernels on Triton."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from pallas_kernels.attention.masks import MASKED


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RunningSoftmax:
    """A softmax over the keys seen so far (Milakov and Gimelshein 2018): q queries, any axes before them.

    Attributes:
        maximum: [..., q], the largest score.
        total: [..., q], the sum of the weights.
        weighted: [..., q, d], the weighted sum of the values.
        exp: what makes a weight of a score: `jnp.exp`, or `jnp.exp2` for scores in units of log2; static.
    """

    maximum: jax.Array
    total: jax.Array
    weighted: jax.Array
    exp: Callable[[jax.Array], jax.Array] = field(metadata={"static": True})

    @classmethod
    def empty(cls, queries: tuple[int, ...], dim: int, exp: Callable[[jax.Array], jax.Array]) -> "RunningSoftmax":
        """No key seen by `queries`, a shape, of values of `dim` channels."""
        return cls(
            jnp.full(queries, MASKED, jnp.float32),
            jnp.zeros(queries, jnp.float32),
            jnp.zeros((*queries, dim), jnp.float32),
            exp,
        )

    def add(self, scores: jax.Array, weigh: Callable[[jax.Array], jax.Array]) -> "RunningSoftmax":
        """After a block of keys: scores [..., q, s]; `weigh` makes the weighted sum [..., q, d] of its values."""
        scaled = self._rescaled(jnp.max(scores, axis=-1))
        weights = self.exp(scores - scaled.maximum[..., None])
        weighted = scaled.weighted + weigh(weights)
        return replace(scaled, total=scaled.total + jnp.sum(weights, axis=-1), weighted=weighted)

    def add_one(self, scores: jax.Array, value: jax.Array, seen: jax.Array | None = None) -> "RunningSoftmax":
        """After one key: scores [..., q] and the value [d], for the queries that are `seen` [..., q]; None for all.

        A query must see a key before or after this one: until then a masked score is its largest.
        """
        scores = scores if seen is None else jnp.where(seen, scores, MASKED)
        scaled = self._rescaled(scores)
        weight = self.exp(scores - scaled.maximum)
        added = weight[..., None] * value.astype(jnp.float32)[None, :]
        weighted = scaled.weighted + (added if seen is None else jnp.where(seen[..., None], added, 0))
        return replace(scaled, total=scaled.total + weight, weighted=weighted)

    def add_sinks(self, scores: jax.Array) -> "RunningSoftmax":
        """After weights without a value, which is what attention sinks are (gpt-oss): scores [..., q]."""
        scaled = self._rescaled(scores)
        return replace(scaled, total=scaled.total + self.exp(scores - scaled.maximum))

    def _rescaled(self, scores: jax.Array) -> "RunningSoftmax":
        """The same softmax, its weights relative to the largest score once `scores` [..., q] are among them."""
        maximum = jnp.maximum(self.maximum, scores)
        correction = self.exp(self.maximum - maximum)
        return replace(
            self, maximum=maximum, total=self.total * correction, weighted=self.weighted * correction[..., None]
        )

    def result(self) -> jax.Array:
        """The weighted mean [..., q, d]; 0 where no key was seen."""
        return self.weighted / jnp.where(self.total > 0, self.total, 1.0)[..., None]
