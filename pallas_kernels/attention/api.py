"""The public functions of paged attention, and the one place that knows the cache's layout.

A layer's cache is one array [pages, 2, kv_heads, page_size, head_dim]: keys at 0, values at 1. A page of one head is
contiguous, which is what a kernel copies, and no reader needs a transpose. Page 0 belongs to nobody: padding tokens
may write there and nobody reads it. What a page holds beyond its row's tokens may be anything, NaN included, and
changes no result.

Axes in the signatures: t tokens, h key-value heads, g query heads of a key-value head, d head_dim.
"""

from typing import Any, Literal

import jax

from pallas_kernels.attention import mosaic_hopper, pallas_decode, pallas_ragged, tuned, xla
from pallas_kernels.attention.locations import PageLocations
from pallas_kernels.attention.masks import Scoring
from pallas_kernels.attention.rotary import Rotation, rotate_queries_and_keys
from pallas_kernels.devices import Platform


def cache_shape(pages: int, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]:
    """The shape of one layer's cache."""
    return (pages, 2, kv_heads, page_size, head_dim)


def append_and_attend(
    qkv: jax.Array,
    cache: jax.Array,
    locations: PageLocations,
    *,
    scoring: Scoring,
    rotation: Rotation | None = None,
    sinks: jax.Array | None = None,
    implementation: Literal["xla"] | None = None,
    platform: Platform | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rotate queries and keys, write keys and values to their pages, attend causally to everything before.

    Softmax attention of each row's newest tokens over that row's pages, accumulated in float32.

    Args:
        qkv: [t, h, g + 2, d], projections: the query heads of a key-value head, its key, its value.
        cache: one layer's cache; donate it, so that the write happens in place.
        locations: the pages of the tokens and of their rows.
        scoring: how scores are made of products, and which keys a query sees.
        rotation: of each token; None for heads that are not rotated, or were before.
        sinks: float [h, g], a score without a value that every query head adds to its softmax; None for none.
        implementation: None takes a kernel on a GPU and XLA elsewhere; only XLA's can be mapped and partitioned.
        platform: what computes; None for JAX's default backend.

    Returns:
        Attention [t, h, g, d] in qkv's dtype, where rows of length 0 and tokens past starts[-1] hold anything; and
        the cache with the new keys and values.

    Raises:
        ValueError: the attention is not causal; keys are written once, when later ones are not there yet. Or rows
            without starts do not own equally many tokens.
    """
    if not scoring.causal:
        raise ValueError("attention over pages is causal; attend without a cache where scoring.causal is False")
    options: dict[str, Any] = {"scoring": scoring, "sinks": sinks}
    tokens, heads, planes, dim = qkv.shape
    rows = locations.lengths.shape[0]
    if locations.starts is None and tokens % rows:
        raise ValueError(f"{tokens} tokens are not equally many of {rows} rows: PageLocations.starts says whose")
    platform = platform or Platform.default()
    if implementation == "xla" or not platform.on_gpu:
        return xla.append_and_attend(qkv, cache, locations, rotation=rotation, **options)
    if rotation is not None and rotation.channels < dim:
        qkv, rotation = rotate_queries_and_keys(qkv, rotation), None
    entry = max(cache.dtype.itemsize, qkv.dtype.itemsize)
    if locations.starts is None:
        longest = locations.page_table.shape[1] * cache.shape[3]
        decode = tuned.decode_config(rows, heads, dim, entry, longest)
        return pallas_decode.decode_attention(qkv, cache, locations, rotation=rotation, config=decode, **options)
    by_hopper = tokens >= tuned.HOPPER_TOKENS and platform.is_hopper and mosaic_hopper.takes(qkv, cache, scoring, sinks)
    ragged = None if by_hopper else tuned.ragged_config(tokens, planes - 2, dim, entry)
    return pallas_ragged.ragged_attention(qkv, cache, locations, rotation=rotation, config=ragged, **options)
