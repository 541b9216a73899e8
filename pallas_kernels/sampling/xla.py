"""Sampling in plain XLA, which finds thresholds by bisection: one pass over the logits for each bit of a key."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sampling import keys
from pallas_kernels.sampling.noise import gumbel


def greedy(logits: jax.Array) -> jax.Array:
    """`pallas_kernels.sampling.greedy`.

    These are two plain reductions, which XLA's CPU backend vectorises; argmax, which it does not, is 7 times slower.
    """
    last = logits.shape[-1] - 1
    ids = jnp.arange(last + 1, dtype=jnp.int32)
    best = logits.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == best, ids, last), axis=-1)


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seed: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """`pallas_kernels.sampling.sample`."""
    logits = logits.astype(jnp.float32)
    best = logits.max(axis=-1, keepdims=True)
    # If XLA fuses the product that made the logits into the subtraction, the difference may not be 0 for the best.
    depth = jnp.where((logits == best) & (best > -jnp.inf), 0.0, keys.depth(logits, best))
    scaled = depth * keys.inverse_temperature(temperature)[:, None]
    rank_low, rank_high, mass_low, mass_high = keys.brackets(temperature, top_k, top_p, logits.shape[1]).T

    rank = keys.rank_key(depth)
    last_rank = _last_key(rank_low, rank_high, lambda key: (rank <= key).sum(-1) >= top_k)
    kept = rank <= last_rank

    mass = keys.mass_key(scaled)
    weights = jnp.where(kept, jnp.exp(-scaled), 0.0)
    target = top_p * weights.sum(-1)
    last_mass = _last_key(mass_low, mass_high, lambda key: jnp.where(mass <= key, weights, 0).sum(-1) >= target)
    kept &= (mass <= last_mass) & (scaled <= -jnp.log(min_p)[:, None])

    def draw() -> jax.Array:
        noise = jnp.where((temperature > 0)[:, None], gumbel(seed, position, logits.shape[1]), 0.0)
        return greedy(jnp.where(kept, noise - scaled, -jnp.inf))

    # The noise of a whole vocabulary is most of the work, and a greedy batch needs none.
    return lax.cond((temperature > 0).any(), draw, lambda: greedy(jnp.where(kept, -scaled, -jnp.inf)))


def _last_key(low: jax.Array, high: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The least key [r, 1] in (low, high] for which `enough(key)` [r] holds; `high` if it holds for none.

    The loop ends once no bracket is wider than 1, and takes no iteration if all of them begin so.
    """

    def halve(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = low + (high - low + 1) // 2
        reached = enough(middle[:, None])
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    _, high = lax.while_loop(lambda bracket: jnp.any(bracket[1] - bracket[0] > 1), halve, (low, high))
    return high[:, None]
