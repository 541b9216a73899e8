"""The public functions of paged attention, and the one place that knows the cache's layout.

A layer's cache is one array [pages, 2, kv_heads, page_size, head_dim]: keys at 0, values at 1. A page of one head is
contiguous, which is what a kernel copies, and no reader needs a transpose. Page 0 belongs to nobody: padding tokens
may write there and nobody reads it. What a page holds beyond its row's tokens may be anything, NaN included, and
changes no result.

Axes in the signatures: t tokens, r rows (sequences), p pages of a row, h key-value heads, g query heads of a
key-value head, d head_dim.
"""

from typing import Literal

import jax

from pallas_kernels import devices
from pallas_kernels.attention import mosaic_hopper, pallas_decode, pallas_ragged, tuned, xla
from pallas_kernels.attention.masks import Scoring
from pallas_kernels.attention.rotary import Rotation


def cache_shape(pages: int, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]:
    """The shape of one layer's cache."""
    return (pages, 2, kv_heads, page_size, head_dim)


def append_and_attend(
    qkv: jax.Array,
    cache: jax.Array,
    page: jax.Array,
    offset: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    starts: jax.Array | None = None,
    *,
    scoring: Scoring,
    rotation: Rotation | None = None,
    sinks: jax.Array | None = None,
    implementation: Literal["xla"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rotate queries and keys, write keys and values to their pages, attend causally to everything before.

    Softmax attention of each row's newest tokens over that row's pages, accumulated in float32.

    Args:
        qkv: [t, h, g + 2, d], projections: the query heads of a key-value head, its key, its value. Row r owns
            tokens starts[r] to starts[r + 1], its last positions.
        cache: one layer's cache; donate it, so that the write happens in place.
        page: int32 [t], the page that takes a token's key and value; 0 for a token that must not be kept.
        offset: int32 [t], the place within that page.
        page_table: int32 [r, p]; position i of row r lives in page page_table[r, i // page_size].
        lengths: int32 [r]; tokens of row r, the new ones included. 0 for a row that is padding.
        starts: int32 [r + 1], rising; None when every row owns exactly one token (t == r).
        scoring: how scores are made of products, and which keys a query sees.
        rotation: of each token; None for heads that are not rotated, or were before.
        sinks: float [h, g], a score without a value that every query head adds to its softmax; None for none.
        implementation: None takes a kernel on a GPU and XLA elsewhere; only XLA's can be mapped and partitioned.

    Returns:
        Attention [t, h, g, d] in qkv's dtype, where rows of length 0 and tokens past starts[-1] hold anything; and
        the cache with the new keys and values.
    """
    if implementation == "xla" or jax.default_backend() != "gpu":
        return xla.append_and_attend(
            qkv, cache, page, offset, page_table, lengths, starts, scoring=scoring, rotation=rotation, sinks=sinks
        )
    tokens, heads, planes, dim = qkv.shape
    entry = max(cache.dtype.itemsize, qkv.dtype.itemsize)
    if starts is None:
        return pallas_decode.decode_attention(
            qkv, cache, page_table, lengths, scoring=scoring, rotation=rotation, sinks=sinks,
            config=tuned.decode_config(tokens, heads, dim, entry, page_table.shape[1] * cache.shape[3]),
        )  # fmt: skip
    by_hopper = (
        tokens >= tuned.HOPPER_TOKENS and devices.is_hopper() and mosaic_hopper.takes(qkv, cache, scoring, sinks)
    )
    return pallas_ragged.ragged_attention(
        qkv, cache, page, offset, page_table, lengths, starts, scoring=scoring, rotation=rotation, sinks=sinks,
        config=None if by_hopper else tuned.ragged_config(tokens, planes - 2, dim, entry),
    )  # fmt: skip
