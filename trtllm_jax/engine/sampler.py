"""Sampling of each row's next token by the row's own parameters, and log-probabilities of the sampled tokens."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import sampling
from pallas_kernels.devices import Platform
from trtllm_jax.engine.row_state import RowSamplingParams

BLOCK = 128
"""How many consecutive ids form a block, for whose maximum `_best` looks first."""


def sample(
    logits: Float[Array, "r v"],
    params: RowSamplingParams,
    positions: Int32[Array, " r"],
    platform: Platform | None = None,
) -> Int32[Array, " r"]:
    """The token sampled for each row, which takes the place `positions` in the row's sequence."""
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


def logprobs(
    logits: Float[Array, "r v"], tokens: Int32[Array, " r"], count: int
) -> tuple[Float32[Array, " r"], Int32[Array, " r"], Int32[Array, "r c"], Float32[Array, "r c"]]:
    """Log-probabilities of the model's own distribution, before temperature, top-k, top-p and min-p.

    Returns those of `tokens` and their ranks (1 is the likeliest), then the ids and the log-probabilities of the
    `count` likeliest tokens.
    """
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(scores, tokens[:, None], axis=1)
    rank = 1 + jnp.sum(scores > own, axis=-1, dtype=jnp.int32)
    values, ids = _best(scores, count)
    return own[:, 0], rank, ids.astype(jnp.int32), values


def _best(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` highest scores of each row and their ids, both [r, count]; of equal scores the lowest id first.

    They lie in the `count` blocks with the highest maxima, so only those blocks are sorted, not the whole vocabulary.
    """
    rows, size = scores.shape
    if size <= BLOCK * count:
        values, ids = lax.top_k(scores, count)
        return values, ids
    padded = jnp.pad(scores, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, BLOCK)
    # Blocks stay in the order of their ids, so that of equal scores the lowest id comes first.
    chosen = jnp.sort(lax.top_k(blocks.max(-1), count)[1], axis=-1)
    values, places = lax.top_k(jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1), count)
    return values, jnp.take_along_axis(chosen, places // BLOCK, axis=1) * BLOCK + places % BLOCK
