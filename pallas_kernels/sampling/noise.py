"""Gumbel noise that depends on a seed, a position and a token id only, computed from registers alone.

Plain uint32 arithmetic, so that a kernel and XLA draw the same words.
"""

import jax
import jax.numpy as jnp
from jax import lax

PAIR = 1024
"""One call of the generator serves token j and token j + PAIR; j has an even quotient by PAIR."""

_ROUNDS = 13
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA

Words = tuple[jax.Array, jax.Array]


def threefry(key: Words, counter: Words, rounds: int = _ROUNDS) -> Words:
    """Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): two uint32 words of noise.

    13 rounds are the fewest that the paper found to pass BigCrush.
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for done in range(1, rounds + 1):
        rotation = _ROTATIONS[(done - 1) % 8]
        x = x + y
        y = ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))) ^ x
        if done % 4 == 0:
            injection = done // 4
            x = x + keys[injection % 3]
            y = y + keys[(injection + 1) % 3] + jnp.uint32(injection)
    return x, y


def row_key(high: jax.Array, low: jax.Array, position: jax.Array) -> Words:
    """The key of one draw, from both words of a seed (uint32) and an int32 position, all of one shape."""
    counter = lax.bitcast_convert_type(position, jnp.uint32)
    return threefry((high, low), (counter, jnp.zeros_like(counter)))


def gumbel_pair(key: Words, tokens: jax.Array) -> Words:
    """The noise, float32, of `tokens` (int32, even quotients by PAIR) and of `tokens + PAIR`."""
    counter = lax.bitcast_convert_type(tokens, jnp.uint32)
    first, second = threefry(key, (counter, jnp.zeros_like(counter)))
    return _gumbel(first), _gumbel(second)


def gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """The noise of tokens 0 to `size`, float32 [r, size], for seeds uint32 [r, 2] and positions int32 [r]."""
    high, low = row_key(seed[:, 0], seed[:, 1], position)
    groups = -(-size // (2 * PAIR))
    tokens = 2 * PAIR * jnp.arange(groups, dtype=jnp.int32)[:, None] + jnp.arange(PAIR, dtype=jnp.int32)
    pairs = gumbel_pair((high[:, None, None], low[:, None, None]), tokens)
    return jnp.stack(pairs, axis=2).reshape(seed.shape[0], -1)[:, :size]


def _gumbel(word: jax.Array) -> jax.Array:
    """-log(-log(1 - u)) of a uniform u in (0, 1).

    Large noise, which wins, comes from small u, where floats are fine: the largest is 22, and ties are rare.
    """
    whole = lax.bitcast_convert_type(word >> jnp.uint32(1), jnp.int32).astype(jnp.float32)
    uniform = jnp.minimum((whole + 0.5) * 2.0**-31, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))
