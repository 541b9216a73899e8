"""The pieces that the attention kernels share: reading queries, keys and values, and the running softmax of a tile.

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


class Running(NamedTuple):
    """A softmax over the keys seen so far, in powers of two (Milakov and Gimelshein 2018): n queries.

    Attributes:
        maximum: [n], the largest score.
        total: [n], the sum of the weights.
        weighted: [n, padded dim], the weighted sum of the values.
    """

    maximum: jax.Array
    total: jax.Array
    weighted: jax.Array

    @classmethod
    def empty(cls, queries: int, heads: Heads) -> "Running":
        """No key seen."""
        return cls(
            jnp.full((queries,), MASKED, jnp.float32),
            jnp.zeros((queries,), jnp.float32),
            jnp.zeros((queries, heads.padded_dim), jnp.float32),
        )

    def add(self, scores: jax.Array, values: jax.Array) -> "Running":
        """After a block of keys: log2 scores [n, s] and values [s, padded dim]."""
        scaled = self._rescaled(jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - scaled.maximum[:, None])
        weighted = scaled.weighted + plgpu.dot(weights.astype(values.dtype), values)
        return Running(scaled.maximum, scaled.total + jnp.sum(weights, axis=1), weighted)

    def add_one(self, scores: jax.Array, value: jax.Array) -> "Running":
        """After one key that every query sees: log2 scores [n] and the value [padded dim]."""
        scaled = self._rescaled(scores)
        weight = jnp.exp2(scores - scaled.maximum)
        weighted = scaled.weighted + weight[:, None] * value.astype(jnp.float32)[None, :]
        return Running(scaled.maximum, scaled.total + weight, weighted)

    def add_sink(self, scores: jax.Array) -> "Running":
        """After weights without a value, which is what attention sinks are (gpt-oss): log2 scores [n]."""
        scaled = self._rescaled(scores)
        return scaled._replace(total=scaled.total + jnp.exp2(scores - scaled.maximum))

    def _rescaled(self, scores: jax.Array) -> "Running":
        """The same softmax, its weights relative to the largest score once `scores` [n] are among them."""
        maximum = jnp.maximum(self.maximum, scores)
        correction = jnp.exp2(self.maximum - maximum)
        return Running(maximum, self.total * correction, self.weighted * correction[:, None])

    def result(self) -> jax.Array:
        """The weighted mean [n, padded dim]; 0 where no key was seen."""
        return self.weighted / jnp.where(self.total > 0, self.total, 1.0)[:, None]


def add_keys(
    running: Running,
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
) -> Running:
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
    return running.add(scores, values.astype(queries.first.dtype))


def whole(arrays: Any) -> Any:
    """The blocks that are whole arrays, for a pytree of arrays or shapes that a kernel indexes itself."""
    return jax.tree.map(lambda array: pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape)), arrays)
