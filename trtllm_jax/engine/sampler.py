"""Drawing the next token by each row's parameters, and log-probabilities of what was drawn.

Axes: r rows, v vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import sampling
from pallas_kernels.devices import Platform
from trtllm_jax.engine.row_state import RowSamplingParams

BLOCK = 128
"""Neighbouring ids of which the highest is looked for first."""


def sample(
    logits: jax.Array, params: RowSamplingParams, positions: jax.Array, platform: Platform | None = None
) -> jax.Array:
    """A token for each row of `logits` [r, v], to stand at `positions` [r] of its sequence: int32 [r]."""
    return sampling.sample(
        logits,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
        position=positions,
        platform=platform,
    )


def logprobs(logits: jax.Array, tokens: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-probabilities before any temperature or cut.

    Returns the tokens' own [r] and their ranks [r] (1 is best), then the `count` best ids and values [r, count].
    """
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(scores, tokens[:, None], axis=1)
    rank = 1 + jnp.sum(scores > own, axis=-1, dtype=jnp.int32)
    values, ids = _best(scores, count)
    return own[:, 0], rank, ids.astype(jnp.int32), values


def _best(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` highest of each row and their places [r, count], the first of equal ones.

    They lie in the blocks whose highest are the highest: few numbers are sorted in place of a whole vocabulary.
    """
    rows, size = scores.shape
    if size <= BLOCK * count:
        return lax.top_k(scores, count)
    padded = jnp.pad(scores, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, BLOCK)
    # In their order, so that of equal numbers the first stays the first.
    chosen = jnp.sort(lax.top_k(blocks.max(-1), count)[1], axis=-1)
    values, places = lax.top_k(jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1), count)
    return values, jnp.take_along_axis(chosen, places // BLOCK, axis=1) * BLOCK + places % BLOCK
