"""The pieces that the attention kernels share: reading queries, keys and values, and adding keys to a softmax.

Tiles have powers of two as sizes, as Triton wants: `Tile` says how many of their places are real. Heads are read in
halves of head_dim, because that is how they are rotated and because it keeps 80 and 96 channels from being padded to
128 twice. What is not real is read as 0, values too: a weight of 0 times what a page held before may be NaN.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention.masks import MASKED, Scoring
from pallas_kernels.attention.rotary import Rotation, turn
from pallas_kernels.attention.softmax import RunningSoftmax

Ref = Any

MIN_DOT = 16
"""The least extent of a Triton dot in any direction."""


@dataclass(frozen=True)
class Heads:
    """The sizes of one layer's attention.

    Attributes:
        kv: key-value heads.
        group: query heads of a key-value head.
        dim: channels of a head.
        page_size: tokens of a page.
    """

    kv: int
    group: int
    dim: int
    page_size: int

    @property
    def half(self) -> int:
        """Half of head_dim, padded: what a dot contracts."""
        return max(MIN_DOT, pl.next_power_of_2(self.dim // 2))

    @property
    def padded_dim(self) -> int:
        """head_dim, padded."""
        return max(MIN_DOT, pl.next_power_of_2(self.dim))

    @property
    def padded_group(self) -> int:
        """The group, padded."""
        return pl.next_power_of_2(self.group)


class Halves(NamedTuple):
    """A tile of heads [n, dim] as its first and its second channels, each [n, half]."""

    first: jax.Array
    second: jax.Array

    def dot_transposed(self, other: "Halves") -> jax.Array:
        """Products [n, m] with the rows of another tile [m, dim], in float32."""
        return plgpu.dot(self.first, other.first, trans_b=True) + plgpu.dot(self.second, other.second, trans_b=True)


def load_rows(ref: Ref, rows: jax.Array, inside: jax.Array | None, first: int, width: int, padded: int) -> jax.Array:
    """Channels first to first + width of rows [n] of a matrix, 0 in what is padding: [n, padded].

    Without `inside` every row is read.
    """
    columns = jnp.arange(padded)
    index, channels = _grid(rows, first + columns)
    mask = _mask(rows, inside, columns, width)
    nothing = None if mask is None else jnp.zeros(mask.shape, ref.dtype)
    return plgpu.load(ref.at[index, channels], mask=mask, other=nothing)


def store_rows(ref: Ref, rows: jax.Array, inside: jax.Array | None, first: int, width: int, values: jax.Array) -> None:
    """Write what `load_rows` reads."""
    columns = jnp.arange(values.shape[1])
    plgpu.store(
        ref.at[_grid(rows, first + columns)], values.astype(ref.dtype), mask=_mask(rows, inside, columns, width)
    )


def _grid(rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (rows.shape[0], columns.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


def _mask(rows: jax.Array, inside: jax.Array | None, columns: jax.Array, width: int) -> jax.Array | None:
    """None where everything is real: a mask that the compiler cannot see through costs instructions."""
    whole = columns.shape[0] == width
    if inside is None and whole:
        return None
    narrow = True if whole else (columns < width)[None, :]
    return jnp.broadcast_to((True if inside is None else inside[:, None]) & narrow, (rows.shape[0], columns.shape[0]))


def load_halves(ref: Ref, heads: Heads, rows: jax.Array, inside: jax.Array | None) -> Halves:
    """Heads `rows` [n] of a matrix of heads."""
    half = heads.dim // 2
    return Halves(
        load_rows(ref, rows, inside, 0, half, heads.half), load_rows(ref, rows, inside, half, half, heads.half)
    )


def load_rotated(
    ref: Ref,
    rotation_ref: Rotation | None,
    heads: Heads,
    rows: jax.Array,
    tokens: jax.Array,
    inside: jax.Array | None,
) -> Halves:
    """Heads `rows` [n] of a matrix of heads, rotated by the angles of their `tokens` [n], in the matrix's dtype."""
    loaded = load_halves(ref, heads, rows, inside)
    if rotation_ref is None:
        return loaded
    half = heads.dim // 2
    cosine = load_rows(rotation_ref.cosine, tokens, inside, 0, half, heads.half)
    sine = load_rows(rotation_ref.sine, tokens, inside, 0, half, heads.half)
    first, second = turn(*loaded, cosine, sine)
    return Halves(first.astype(ref.dtype), second.astype(ref.dtype))


def cache_rows(page: jax.Array, heads: Heads, head: jax.Array, offset: jax.Array) -> jax.Array:
    """The row of a key in the cache as a matrix [pages * 2 * kv * page_size, dim]; its value is `value_step` on."""
    return ((page * 2) * heads.kv + head) * heads.page_size + offset


def value_step(heads: Heads) -> int:
    """Rows between a key and its value."""
    return heads.kv * heads.page_size


def add_keys(
    running: RunningSoftmax,
    queries: Halves,
    positions: jax.Array,
    cache_ref: Ref,
    page_table_ref: Ref,
    heads: Heads,
    scoring: Scoring,
    *,
    row: jax.Array,
    head: jax.Array,
    first: jax.Array,
    end: jax.Array,
    block: int,
    masked: bool,
) -> RunningSoftmax:
    """The softmax after the `block` cached keys of a row from position `first` on, those before `end` only.

    `positions` [n] are the queries'; without `masked` the caller vouches that every query sees the whole block.
    """
    places = first + jnp.arange(block)
    inside = places < end if masked else None
    # Any page will do for a place outside; a mask would make this read wait for the one of `end`.
    column = jnp.minimum(places // heads.page_size, page_table_ref.shape[1] - 1)
    page = plgpu.load(page_table_ref.at[jnp.broadcast_to(row, column.shape), column])
    rows = cache_rows(page, heads, head, places % heads.page_size)
    keys = load_halves(cache_ref, heads, rows, inside)
    keys = Halves(keys.first.astype(queries.first.dtype), keys.second.astype(queries.first.dtype))
    values = load_rows(cache_ref, rows + value_step(heads), inside, 0, heads.dim, heads.padded_dim)
    scores = scoring.log2_scores(queries.dot_transposed(keys))
    if inside is not None:
        seen = scoring.visible(positions[:, None], places[None, :]) & inside[None, :]
        scores = jnp.where(seen, scores, MASKED)
    values = values.astype(queries.first.dtype)
    return running.add(scores, lambda weights: plgpu.dot(weights.astype(values.dtype), values))


def whole(arrays: Any) -> Any:
    """The blocks that are whole arrays, for a pytree of arrays or shapes that a kernel indexes itself."""
    return jax.tree.map(lambda array: pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape)), arrays)
