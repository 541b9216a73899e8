"""The public functions of paged attention, and the one place that knows the cache's layout.

A layer's cache is one array [pages, 2, kv_heads, page_size, head_dim]: keys at 0, values at 1. A page of one head is
contiguous, which is what a kernel copies, and no reader needs a transpose. Page 0 belongs to nobody: padding tokens
write there and nobody reads it.

Axes in the signatures: t tokens, r rows (sequences), p pages of a row, h key-value heads, g query heads of a
key-value head, d head_dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import xla


def cache_shape(pages: int, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]:
    """The shape of one layer's cache."""
    return (pages, 2, kv_heads, page_size, head_dim)


def write_pages(cache: jax.Array, k: jax.Array, v: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """The cache with token t's key and value at `offset[t]` of page `page[t]`.

    Args:
        cache: one layer's cache; donate it, so that the write happens in place.
        k: keys [t, h, d], rotated already.
        v: values [t, h, d].
        page: int32 [t]; 0 for a token that must not be kept.
        offset: int32 [t].
    """
    entry = jnp.stack([k, v], axis=1).astype(cache.dtype)
    return cache.at[page, :, :, offset].set(entry)


def paged_attention(
    q: jax.Array,
    cache: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    starts: jax.Array | None = None,
    *,
    scale: float,
) -> jax.Array:
    """Causal softmax attention of each row's newest tokens over that row's pages, accumulated in float32.

    Args:
        q: queries [t, h, g, d]; row r owns tokens starts[r] to starts[r + 1], its last positions.
        cache: one layer's cache, which holds the keys and values of the queries' own tokens too.
        page_table: int32 [r, p]; position i of row r lives in page page_table[r, i // page_size].
        lengths: int32 [r]; tokens of row r in the cache, the queries' own included. 0 for a row that is padding.
        starts: int32 [r + 1], rising; None when every row owns exactly one token (t == r).
        scale: factor on the scores before the softmax.

    Returns:
        [t, h, g, d] in q's dtype; rows of length 0 and tokens past starts[-1] hold zeros or finite garbage.
    """
    if starts is None:
        return xla.decode_attention(q, cache, page_table, lengths, scale=scale)
    return xla.ragged_attention(q, cache, page_table, lengths, starts, scale=scale)
