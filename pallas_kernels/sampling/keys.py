"""Integer keys by which tokens are compared, and the bracket in which each threshold is searched.

A token's depth is how far its logit lies below the row's largest: 0 for the likeliest token, infinite for a banned one.
Floats that are not negative are ordered as the integers with their bits are, so a bisection over integers finds a
threshold exactly and without a sort. A threshold is the largest key that is kept. It lies in its bracket (low, high];
once that is no wider than 1 the search is over, and `high` is the threshold.
"""

import jax
import jax.numpy as jnp
from jax import lax

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures are clipped to this range: beyond it the distribution is one token or uniform, and floats overflow."""

EVERYTHING = 0x7F800000
"""The key of an infinite depth: as a threshold it keeps all tokens."""

_LARGEST = 3.4028234e38
_ONE = 0x3F800000


def inverse_temperature(temperature: jax.Array) -> jax.Array:
    """The float32 factor on depths."""
    return 1 / jnp.minimum(jnp.maximum(temperature, COLDEST), HOTTEST)


def depth(logits: jax.Array, best: jax.Array) -> jax.Array:
    """How far each logit lies below the row's largest, `best`: never negative, and NaN only if a logit is."""
    finite = jnp.minimum(jnp.maximum(best, -_LARGEST), _LARGEST)
    return jnp.maximum(finite - logits, 0.0)


def rank_key(depth: jax.Array) -> jax.Array:
    """The keys for top-k; tokens of equal depth have equal keys."""
    return lax.bitcast_convert_type(depth, jnp.int32)


def mass_key(scaled: jax.Array) -> jax.Array:
    """The keys for top-p, from depth / temperature; tokens of equal probability, up to rounding, have equal keys.

    Adding 1 removes the exponents below 0, so that 26 bits are left to search instead of 31.
    """
    return lax.bitcast_convert_type(1 + scaled, jnp.int32)


def brackets(temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, vocabulary: int) -> jax.Array:
    """Each row's brackets before the search, int32 [r, 4]: low and high for top-k, then low and high for top-p.

    A row without a top-k or top-p starts with that threshold found. So does a greedy row, whose top-k threshold is 0.
    No bracket excludes the likeliest token.
    """
    draws = temperature > 0
    ranked = draws & (top_k > 0) & (top_k < vocabulary)
    massed = draws & (top_p < 1)
    # Tokens deeper than this have a probability below 1 - top_p altogether, so top-p keeps none of them.
    deepest = mass_key(jnp.log(vocabulary) - jnp.log1p(-top_p))
    return jnp.stack(
        [
            jnp.where(ranked | ~draws, -1, EVERYTHING),
            jnp.where(draws, EVERYTHING, 0),
            jnp.where(massed, _ONE - 1, EVERYTHING),
            jnp.where(massed, deepest, EVERYTHING),
        ],
        axis=1,
    )
