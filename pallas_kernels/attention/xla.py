"""Paged attention in plain XLA: the reference for every kernel, and the implementation where no kernel runs.

Both functions loop over blocks of the context with a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).
The bounds of the loop depend on the data, so that short contexts cost little however wide the page table is.

A page may hold anything beyond its row's tokens: scores are masked by selection, and so are values, because a weight
of 0 times a value that is not finite is NaN.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.locations import PADDING_PAGE, PageLocations
from pallas_kernels.attention.masks import MASKED, Scoring
from pallas_kernels.attention.rotary import Rotation, rotate
from pallas_kernels.attention.softmax import RunningSoftmax

BLOCK_TOKENS = 128
"""How many tokens of the context an iteration reads, rounded down to whole pages, but at least one page."""

TILE_TOKENS = 32
"""How many consecutive tokens of a row an iteration of `ragged_attention` computes."""


def append_and_attend(
    qkv: Float[Array, "t h qkv d"],
    cache: Float[Array, "pages 2 h page_size d"],
    locations: PageLocations,
    *,
    scoring: Scoring,
    rotation: Rotation | None = None,
    sinks: Float[Array, "h g"] | None = None,
    slopes: Float[Array, "h g"] | None = None,
) -> tuple[Float[Array, "t h g d"], Float[Array, "pages 2 h page_size d"]]:
    """`pallas_kernels.attention.append_and_attend`: rotate, then write, then attend."""
    group = qkv.shape[2] - 2
    turned = qkv[:, :, : group + 1]
    if rotation is not None:
        turned = rotate(turned, rotation)
    cache = write_pages(cache, turned[:, :, group], qkv[:, :, group + 1], locations.page, locations.offset)
    queries = turned[:, :, :group]
    table, lengths = locations.page_table, locations.lengths
    if locations.starts is None:
        rows = lengths.shape[0]
        each = queries.shape[0] // rows
        # A single new token always has a page. Of several, the last may have none, and then they are not in the cache.
        kept = each if each == 1 else jnp.sum(locations.page.reshape(rows, each) > 0, axis=1)
        return decode_attention(queries, cache, table, lengths, lengths - each + kept, scoring, sinks, slopes), cache
    return ragged_attention(queries, cache, table, lengths, locations.starts, scoring, sinks, slopes), cache


def write_pages(
    cache: Float[Array, "pages 2 h page_size d"],
    k: Float[Array, "t h d"],
    v: Float[Array, "t h d"],
    page: Int32[Array, " t"],
    offset: Int32[Array, " t"],
) -> Float[Array, "pages 2 h page_size d"]:
    """The cache with each token's key and value written at its `offset` within its `page`."""
    entry = jnp.stack([k, v], axis=1).astype(cache.dtype)
    return cache.at[page, :, :, offset].set(entry)


def _read_block(
    cache: jax.Array, page_table: jax.Array, ends: jax.Array, block: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """Float32 keys and values [r * h, width * page_size, d] of every row's pages from `block * width` on.

    Values at or after position `ends` [r] of a row are 0, and so are those of pages that were given back.
    """
    _, _, heads, page_size, head_dim = cache.shape
    pages = lax.dynamic_slice_in_dim(page_table, block * width, width, axis=1)
    first = pages[:, None, :] * (2 * heads) + jnp.arange(heads)[:, None]
    by_head = cache.reshape(-1, page_size, head_dim)

    def read(index: jax.Array) -> jax.Array:
        return (
            by_head.at[index].get(mode="promise_in_bounds").reshape(-1, width * page_size, head_dim).astype(jnp.float32)
        )

    positions = block * width * page_size + jnp.arange(width * page_size)
    inside = (positions < ends[:, None]) & jnp.repeat(pages != PADDING_PAGE, page_size, axis=1)
    return read(first), jnp.where(jnp.repeat(inside, heads, axis=0)[..., None], read(first + heads), 0)


def _weighted(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The sums [n, q, d] of values [n, s, d] with weights [n, q, s], where n is any batch of heads."""
    return jnp.einsum("nqs,nsd->nqd", weights, values)


def _whole_blocks(page_table: jax.Array, page_size: int) -> tuple[jax.Array, int]:
    """The page table padded with page 0 to whole blocks, and the number of pages in a block."""
    width = max(1, min(BLOCK_TOKENS // page_size, page_table.shape[1]))
    return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % width))), width


def decode_attention(
    q: Float[Array, "t h g d"],
    cache: Float[Array, "pages 2 h page_size d"],
    page_table: Int32[Array, "r p"],
    lengths: Int32[Array, " r"],
    ends: Int32[Array, " r"],
    scoring: Scoring,
    sinks: Float[Array, "h g"] | None = None,
    slopes: Float[Array, "h g"] | None = None,
) -> Float[Array, "t h g d"]:
    """Attention of rotated queries, which are the last t / r tokens of each row.

    The cache holds the keys and values of a row's tokens before `ends`.
    """
    tokens, heads, group, head_dim = q.shape
    rows, page_size = lengths.shape[0], cache.shape[3]
    each = tokens // rows
    page_table, width = _whole_blocks(page_table, page_size)
    block_tokens = width * page_size
    by_head = q.reshape(rows, each, heads, group, head_dim).swapaxes(1, 2)
    queries = by_head.reshape(rows * heads, each * group, head_dim).astype(jnp.float32)
    first_new = jnp.repeat(lengths - each, heads)[:, None, None]
    query_positions = first_new + jnp.repeat(jnp.arange(each), group)

    def add_block(block: jax.Array, softmax: RunningSoftmax) -> RunningSoftmax:
        keys, values = _read_block(cache, page_table, ends, block, width)
        # Keys are the left operand: a library that packs the right one then packs the few queries.
        scores = scoring.scores(jnp.einsum("nsd,nqd->nsq", keys, queries))
        positions = (block * block_tokens + jnp.arange(block_tokens))[:, None]
        if slopes is not None:
            falls = jnp.tile(slopes.astype(jnp.float32), (rows, each))[:, None, :]
            scores += falls * (positions - query_positions)
        scores = jnp.where(scoring.visible(query_positions, positions), scores, MASKED)
        return softmax.add(scores.transpose(0, 2, 1), partial(_weighted, values))

    longest = jnp.max(lengths)
    first = jnp.min(scoring.first_visible(jnp.where(lengths > 0, lengths, longest) - each)) // block_tokens
    empty = RunningSoftmax.empty((rows * heads, each * group), head_dim, jnp.exp)
    softmax = lax.fori_loop(first, -(-longest // block_tokens), add_block, empty)
    if sinks is not None:
        softmax = softmax.add_sinks(jnp.tile(sinks.astype(jnp.float32), (rows, each)))
    attended = softmax.result().reshape(rows, heads, each, group, head_dim).swapaxes(1, 2)
    return attended.reshape(q.shape).astype(q.dtype)


def ragged_attention(
    q: Float[Array, "t h g d"],
    cache: Float[Array, "pages 2 h page_size d"],
    page_table: Int32[Array, "r p"],
    lengths: Int32[Array, " r"],
    starts: Int32[Array, " r+1"],
    scoring: Scoring,
    sinks: Float[Array, "h g"] | None = None,
    slopes: Float[Array, "h g"] | None = None,
) -> Float[Array, "t h g d"]:
    """Attention of rotated queries of rows with any number of tokens, as a loop over tiles of one row each.

    A tile that reaches past the end of its row writes meaningless results for the next row's tokens. Tiles run in
    order, so the next row's tiles overwrite them; the last tile's go to padding.
    """
    tokens = q.shape[0]
    page_table, width = _whole_blocks(page_table, cache.shape[3])
    counts = starts[1:] - starts[:-1]
    tile_ends = jnp.cumsum(-(-counts // TILE_TOKENS))
    padded = jnp.pad(q, ((0, TILE_TOKENS), (0, 0), (0, 0), (0, 0)))

    def attend(out: jax.Array, row: jax.Array, first: jax.Array, size: int) -> jax.Array:
        """`out` with the results of `size` tokens of `row`, starting at `first`."""
        position = lengths[row] - starts[row + 1] + first
        tile = lax.dynamic_slice_in_dim(padded, first, size)
        end = jnp.minimum(position + size, lengths[row])
        attended = _tile_attention(tile, cache, page_table[row], position, end, width, scoring, sinks, slopes)
        return lax.dynamic_update_slice_in_dim(out, attended.astype(out.dtype), first, 0)

    def add_tile(tile: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(tile_ends, tile, side="right")
        before = jnp.where(row > 0, tile_ends[row - 1], 0)
        first = starts[row] + (tile - before) * TILE_TOKENS
        # A decoding row has one new token, for which a whole tile would be 32 times the work.
        return lax.cond(
            counts[row] == 1,
            lambda out: attend(out, row, first, 1),
            lambda out: attend(out, row, first, TILE_TOKENS),
            out,
        )

    return lax.fori_loop(0, tile_ends[-1], add_tile, jnp.zeros_like(padded))[:tokens]


def _tile_attention(
    q: jax.Array,
    cache: jax.Array,
    pages: jax.Array,
    position: jax.Array,
    length: jax.Array,
    width: int,
    scoring: Scoring,
    sinks: jax.Array | None,
    slopes: jax.Array | None,
) -> jax.Array:
    """Causal attention over `length` tokens of consecutive queries [t, h, g, d], the first of them at `position`."""
    tokens, heads, group, head_dim = q.shape
    block_tokens = width * cache.shape[3]
    by_head = q.transpose(1, 2, 0, 3).reshape(heads, group * tokens, head_dim).astype(jnp.float32)
    query_positions = jnp.tile(position + jnp.arange(tokens), group)[:, None]

    def add_block(block: jax.Array, softmax: RunningSoftmax) -> RunningSoftmax:
        keys, values = _read_block(cache, pages[None], length[None], block, width)
        scores = scoring.scores(jnp.einsum("nqd,nsd->nqs", by_head, keys))
        positions = block * block_tokens + jnp.arange(block_tokens)
        if slopes is not None:
            falls = jnp.repeat(slopes.astype(jnp.float32), tokens, axis=1)[:, :, None]
            scores += falls * (positions - query_positions)
        # Queries past the end of the row would attend to positions that were never written.
        visible = scoring.visible(query_positions, positions) & (positions < length)
        return softmax.add(jnp.where(visible, scores, MASKED), partial(_weighted, values))

    first = scoring.first_visible(position) // block_tokens
    empty = RunningSoftmax.empty((heads, group * tokens), head_dim, jnp.exp)
    softmax = lax.fori_loop(first, -(-length // block_tokens), add_block, empty)
    if sinks is not None:
        softmax = softmax.add_sinks(jnp.repeat(sinks.astype(jnp.float32), tokens, axis=1))
    return softmax.result().reshape(heads, group, tokens, head_dim).transpose(2, 0, 1, 3)
