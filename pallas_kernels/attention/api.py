"""The public functions of paged attention, and the layout of its cache.

A layer's cache is one array [pages, 2, kv_heads, page_size, head_dim]: keys at 0, values at 1. A page of one head is
contiguous, which is what a kernel copies, and no reader needs a transpose. Page 0 belongs to no row: padding tokens may
be written to it, and it stands in a page table for pages that no new token attends to. It may hold anything, and any
page may beyond its row's tokens, NaN included, without changing a result.
"""

from typing import Any, Literal

from jaxtyping import Array, Float

from pallas_kernels.attention import mosaic_hopper, pallas_decode, pallas_ragged, tuned, xla
from pallas_kernels.attention.head_norms import HeadNorms, normalise_queries_and_keys
from pallas_kernels.attention.locations import PageLocations
from pallas_kernels.attention.masks import Scoring
from pallas_kernels.attention.rotary import Rotation, rotate_queries_and_keys
from pallas_kernels.devices import Platform

LARGEST_KERNEL_HEAD = 256
"""The most channels of a head that the kernels hold in shared memory."""


def cache_shape(pages: int, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]:
    """The shape of a layer's cache."""
    return (pages, 2, kv_heads, page_size, head_dim)


def append_and_attend(
    qkv: Float[Array, "t h qkv d"],
    cache: Float[Array, "pages 2 h page_size d"],
    locations: PageLocations,
    *,
    scoring: Scoring,
    norms: HeadNorms | None = None,
    rotation: Rotation | None = None,
    sinks: Float[Array, "h g"] | None = None,
    slopes: Float[Array, "h g"] | None = None,
    implementation: Literal["xla"] | None = None,
    platform: Platform | None = None,
) -> tuple[Float[Array, "t h g d"], Float[Array, "pages 2 h page_size d"]]:
    """Causal softmax attention of each row's new tokens, after their keys and values have been written to its pages.

    Queries and keys are normalised, then rotated, first. Sums are accumulated in float32.

    Args:
        qkv: for each key-value head its g query heads, its key and its value (qkv = g + 2).
        cache: a layer's cache; donate it, so that it is updated in place.
        locations: the pages of the tokens and of their rows.
        scoring: how scores are computed, and which keys a query attends to.
        norms: of the queries and of the keys; None if they are not normalised, or already are.
        rotation: of each token; None if the heads are not rotated, or already are.
        sinks: for each query head a score that joins its softmax without a value; None for none.
        slopes: for each query head what a score falls by with every position that the key is before the query (ALiBi,
            Press et al. 2021, arXiv:2108.12409); None for nothing.
        implementation: None takes a kernel on a GPU, for heads of at most 256 channels, and XLA elsewhere; only XLA's
            can be mapped and partitioned.
        platform: the one that computes it; None for JAX's default backend.

    Returns:
        The attention in qkv's dtype, undefined for rows of length 0 and tokens past starts[-1]; and the cache with the
        new keys and values.

    Raises:
        ValueError: the attention is not causal, which a cache cannot support because later keys are not in it yet; or
            locations has no starts and t is not a multiple of r.
    """
    if not scoring.causal:
        raise ValueError("attention over pages is causal; attend without a cache where scoring.causal is False")
    options: dict[str, Any] = {"scoring": scoring, "sinks": sinks, "slopes": slopes}
    tokens, heads, planes, dim = qkv.shape
    rows = locations.lengths.shape[0]
    if locations.starts is None and tokens % rows:
        raise ValueError(f"{tokens} tokens are not equally many of {rows} rows: PageLocations.starts says whose")
    platform = platform or Platform.default()
    by_xla = implementation == "xla" or not platform.on_gpu or dim > LARGEST_KERNEL_HEAD
    rotated_in_part = rotation is not None and rotation.channels < dim
    if norms is not None and (by_xla or rotated_in_part or not norms.in_kernels):
        qkv, norms = normalise_queries_and_keys(qkv, norms, "xla"), None
    if by_xla:
        return xla.append_and_attend(qkv, cache, locations, rotation=rotation, **options)
    if rotated_in_part:
        qkv, rotation = rotate_queries_and_keys(qkv, rotation), None
    options |= {"norms": norms, "rotation": rotation}
    entry = max(cache.dtype.itemsize, qkv.dtype.itemsize)
    if locations.starts is None:
        longest = locations.page_table.shape[1] * cache.shape[3]
        decode = tuned.decode_config(rows, heads, dim, entry, longest)
        return pallas_decode.decode_attention(qkv, cache, locations, config=decode, **options)
    long = tokens >= tuned.HOPPER_TOKENS
    by_hopper = long and platform.is_hopper and mosaic_hopper.takes(qkv, cache, scoring, sinks, slopes)
    ragged = None if by_hopper else tuned.ragged_config(tokens, planes - 2, dim, entry)
    return pallas_ragged.ragged_attention(qkv, cache, locations, config=ragged, **options)
