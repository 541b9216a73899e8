"""Integer keys by which tokens are compared, and the brackets in which the last kept key of each cut lies.

A token's depth is how far its logit lies below the row's largest: 0 for the likeliest, infinite for a banned one. The
bits of floats that are not negative rise with them, so a search over integers finds a threshold exactly, without a
sort. A bracket (low, high] holds the last key that is kept; one no wider than 1 is settled, and `high` is that key.
"""

import jax
import jax.numpy as jnp
from jax import lax

COLDEST, HOTTEST = 1e-30, 1e30
"""The range of temperatures divided by: beyond it no choice is left or all are equal, and floats overflow."""

EVERYTHING = 0x7F800000
"""The key of infinity: a cut that keeps it keeps all tokens."""

_LARGEST = 3.4028234e38
_ONE = 0x3F800000


def inverse_temperature(temperature: jax.Array) -> jax.Array:
    """What depths are multiplied by, float32."""
    return 1 / jnp.minimum(jnp.maximum(temperature, COLDEST), HOTTEST)


def depth(logits: jax.Array, best: jax.Array) -> jax.Array:
    """How far each logit lies below the row's largest, never negative and never NaN where no logit is."""
    finite = jnp.minimum(jnp.maximum(best, -_LARGEST), _LARGEST)
    return jnp.maximum(finite - logits, 0.0)


def rank_key(depth: jax.Array) -> jax.Array:
    """Keys for top-k: equal where depths are equal."""
    return lax.bitcast_convert_type(depth, jnp.int32)


def mass_key(scaled: jax.Array) -> jax.Array:
    """Keys of depth / temperature for top-p: equal where probabilities are, to float32's relative rounding.

    Adding one takes away the exponents below: 26 bits instead of 31 are left to search.
    """
    return lax.bitcast_convert_type(1 + scaled, jnp.int32)


def brackets(temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, vocabulary: int) -> jax.Array:
    """Where each row's searches start, int32 [r, 4]: low and high of the rank key, then of the mass key.

    A cut that a row does not ask for is settled. So is a greedy row, whose rank key can only be 0. The likeliest token
    lies in every bracket.
    """
    draws = temperature > 0
    ranked = draws & (top_k > 0) & (top_k < vocabulary)
    massed = draws & (top_p < 1)
    # All tokens deeper than this have less than 1 - top_p together, so a nucleus ends before it.
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
