"""Drawing the next token from logits, and log-probabilities of what was drawn.

Axes: r rows, v vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from trtllm_jax.engine.row_state import Wishes

COLDEST = 1e-30
"""The least temperature divided by: far below any that leaves a choice, and far above where scores become infinite."""


def greedy(logits: jax.Array) -> jax.Array:
    """The likeliest token of each row, the lowest id where several are: int32 [r].

    Two plain reductions: XLA's CPU backend vectorises them, but not the pairs of argmax (7 times slower).
    """
    last = logits.shape[-1] - 1
    ids = jnp.arange(last + 1, dtype=jnp.int32)
    best = logits.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == best, ids, last), axis=-1)


def sample(logits: jax.Array, wishes: Wishes, positions: jax.Array) -> jax.Array:
    """A token for each row, int32 [r]: temperature, then top-k, top-p and min-p, then a draw from what is left.

    The draw depends on the row's logits, its seed and `positions` [r] only, whatever else is in the batch. It is a
    Gumbel-max (Gumbel 1954): the argmax of scores plus independent noise has the softmax's distribution. A row of
    temperature 0 takes its likeliest token. Ties at a threshold are all kept.
    """
    with jax.named_scope("sample"):
        chosen = greedy(logits)
        draws = wishes.temperature > 0
        scaled = logits / jnp.where(draws, jnp.maximum(wishes.temperature, COLDEST), 1.0)[:, None]
        scaled = _when(jnp.any(draws & (wishes.top_k > 0)), _keep_top_k, scaled, wishes.top_k)
        scaled = _when(jnp.any(draws & (wishes.top_p < 1)), _keep_top_p, scaled, wishes.top_p)
        scaled = _keep_min_p(scaled, wishes.min_p)
        noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(wishes.seed, positions, logits.shape[1])
        return jnp.where(draws, greedy(scaled + noise), chosen)


def logprobs(logits: jax.Array, tokens: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-probabilities before any temperature or cut.

    Returns the tokens' own [r] and their ranks [r] (1 is best), then the `count` best ids and values [r, count].
    """
    scores = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(scores, tokens[:, None], axis=1)
    rank = 1 + jnp.sum(scores > own, axis=-1, dtype=jnp.int32)
    values, ids = lax.top_k(scores, count)
    return own[:, 0], rank, ids.astype(jnp.int32), values


def _when(
    condition: jax.Array, cut: Callable[[jax.Array, jax.Array], jax.Array], scores: jax.Array, parameter: jax.Array
) -> jax.Array:
    """`cut(scores, parameter)` where any row asks for it: searching a threshold for nobody costs 32 passes."""
    return lax.cond(condition, cut, lambda scores, _: scores, scores, parameter)


def _gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (size,), jnp.float32)


def _largest_threshold(values: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest float32 t [r, 1] for which `enough(values >= t)` [r] holds, found bit by bit without a sort.

    Minus infinity where everything is not enough, as rounding may have it. `enough` must stay false once it is false
    as t grows.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floats they stand for.
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)

    def try_bit(step: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (sign >> step.astype(jnp.uint32))
        return jnp.where(enough(ordered >= candidate[:, None]), candidate, threshold)

    threshold = lax.fori_loop(0, 32, try_bit, jnp.zeros(values.shape[0], jnp.uint32))
    threshold = jnp.maximum(threshold, jnp.uint32(0x007FFFFF))  # minus infinity; what comes before it is no number
    unordered = jnp.where(threshold >= sign, threshold ^ sign, ~threshold)
    return lax.bitcast_convert_type(unordered, jnp.float32)[:, None]


def _keep_top_k(scores: jax.Array, top_k: jax.Array) -> jax.Array:
    """Scores with everything below the k-th largest removed; k of 0 removes nothing."""
    wanted = jnp.where(top_k > 0, top_k, scores.shape[1])
    threshold = _largest_threshold(scores, lambda kept: kept.sum(-1) >= wanted)
    return jnp.where(scores >= threshold, scores, -jnp.inf)


def _keep_top_p(scores: jax.Array, top_p: jax.Array) -> jax.Array:
    """Scores of the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020)."""
    probabilities = jax.nn.softmax(scores, axis=-1)
    threshold = _largest_threshold(probabilities, lambda kept: jnp.where(kept, probabilities, 0).sum(-1) >= top_p)
    return jnp.where((probabilities >= threshold) | (top_p >= 1)[:, None], scores, -jnp.inf)


def _keep_min_p(scores: jax.Array, min_p: jax.Array) -> jax.Array:
    """Scores of tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    floor = scores.max(-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(scores >= floor, scores, -jnp.inf)
