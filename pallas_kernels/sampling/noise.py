"""Gumbel noise that depends only on a seed, a position and a token id, computed without reading memory.

It is plain uint32 arithmetic, so that kernels and XLA generate the same random words.
"""

import jax
import jax.numpy as jnp
from jax import lax

PAIR = 1024
"""One call of the generator gives the noise of token j, where j // PAIR is even, and of token j + PAIR."""

_ROUNDS = 13
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA

Words = tuple[jax.Array, jax.Array]


def threefry(key: Words, counter: Words, rounds: int = _ROUNDS) -> Words:
    """Two random uint32 words by Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

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
    """The generator's key for one token's position, from the two uint32 words of a seed and an int32 position.

    All have one shape.
    """
    counter = lax.bitcast_convert_type(position, jnp.uint32)
    return threefry((high, low), (counter, jnp.zeros_like(counter)))


def gumbel_pair(key: Words, tokens: jax.Array) -> Words:
    """The float32 noise of `tokens`, int32 ids for which `tokens // PAIR` is even, and of `tokens + PAIR`."""
    counter = lax.bitcast_convert_type(tokens, jnp.uint32)
    first, second = threefry(key, (counter, jnp.zeros_like(counter)))
    return _gumbel(first), _gumbel(second)


def gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """The noise of tokens 0 to `size`, float32 [r, size], from seeds uint32 [r, 2] and positions int32 [r]."""
    high, low = row_key(seed[:, 0], seed[:, 1], position)
    groups = -(-size // (2 * PAIR))
    tokens = 2 * PAIR * jnp.arange(groups, dtype=jnp.int32)[:, None] + jnp.arange(PAIR, dtype=jnp.int32)
    pairs = gumbel_pair((high[:, None, None], low[:, None, None]), tokens)
    return jnp.stack(pairs, axis=2).reshape(seed.shape[0], -1)[:, :size]


def _gumbel(word: jax.Array) -> jax.Array:
    """-log(-log(1 - u)) of a u that is uniform in (0, 1).

    Large noise, which decides, comes from small u, where floats are dense: its maximum is 22, and ties are rare.
    """
    whole = lax.bitcast_convert_type(word >> jnp.uint32(1), jnp.int32).astype(jnp.float32)
    uniform = jnp.minimum((whole + 0.5) * 2.0**-31, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))
