"""Helpers that the attention kernels share: loading queries, keys and values, and adding keys to a softmax.

The sizes of tiles are powers of two, as Triton requires, so parts of a tile may be padding. Heads are loaded in halves
of head_dim, because that is how they are rotated, and because heads of 80 or 96 channels need less padding so. Padding
is loaded as 0, also in values: a weight of 0 times whatever a page held before may be NaN.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels.attention.locations import PADDING_PAGE
from pallas_kernels.attention.masks import MASKED, Scoring
from pallas_kernels.attention.rotary import Rotation, turn
from pallas_kernels.attention.softmax import RunningSoftmax
from pallas_kernels.norm import Norm

Ref = Any

MIN_DOT = 16
"""The smallest size of any axis of a Triton dot."""


@dataclass(frozen=True)
class Heads:
    """The sizes of one layer's attention.

    Attributes:
        kv: the number of key-value heads.
        group: the number of query heads of a key-value head.
        dim: the number of channels of a head.
        page_size: the number of tokens of a page.
    """

    kv: int
    group: int
    dim: int
    page_size: int

    @property
    def half(self) -> int:
        """Half of head_dim, padded: the size that a dot contracts."""
        return max(MIN_DOT, pl.next_power_of_2(self.dim // 2))

    @property
    def padded_dim(self) -> int:
        """The number of channels of a head, padded."""
        return max(MIN_DOT, pl.next_power_of_2(self.dim))

    @property
    def padded_group(self) -> int:
        """The number of query heads of a key-value head, padded."""
        return pl.next_power_of_2(self.group)


class Halves(NamedTuple):
    """A tile of heads [n, dim] as the first and the second half of its channels, each [n, half]."""

    first: Float[Array, "n half"]
    second: Float[Array, "n half"]

    def dot_transposed(self, other: "Halves") -> Float32[Array, "n m"]:
        """The products with the heads of another tile [m, dim]."""
        return plgpu.dot(self.first, other.first, trans_b=True) + plgpu.dot(self.second, other.second, trans_b=True)


def load_rows(
    ref: Ref, rows: Int[Array, " n"], inside: Bool[Array, " n"] | None, first: int, width: int, padded: int
) -> Float[Array, "n {padded}"]:
    """The channels `first` to `first + width` of rows of a matrix, with zeros for padding.

    Rows that are not `inside` are zeros too; None if all of them are.
    """
    columns = jnp.arange(padded)
    index, channels = _grid(rows, first + columns)
    mask = _mask(rows, inside, columns, width)
    nothing = None if mask is None else jnp.zeros(mask.shape, ref.dtype)
    return plgpu.load(ref.at[index, channels], mask=mask, other=nothing)


def store_rows(
    ref: Ref,
    rows: Int[Array, " n"],
    inside: Bool[Array, " n"] | None,
    first: int,
    width: int,
    values: Float[Array, "n padded"],
) -> None:
    """Store values to where `load_rows` loads them from."""
    columns = jnp.arange(values.shape[1])
    plgpu.store(
        ref.at[_grid(rows, first + columns)], values.astype(ref.dtype), mask=_mask(rows, inside, columns, width)
    )


def _grid(rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (rows.shape[0], columns.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


def _mask(rows: jax.Array, inside: jax.Array | None, columns: jax.Array, width: int) -> jax.Array | None:
    """The mask of a load or store; None if nothing is padding, because a mask costs instructions."""
    whole = columns.shape[0] == width
    if inside is None and whole:
        return None
    narrow = True if whole else (columns < width)[None, :]
    return jnp.broadcast_to((True if inside is None else inside[:, None]) & narrow, (rows.shape[0], columns.shape[0]))


def load_halves(ref: Ref, heads: Heads, rows: Int[Array, " n"], inside: Bool[Array, " n"] | None) -> Halves:
    """The heads `rows` of a matrix of heads."""
    half = heads.dim // 2
    return Halves(
        load_rows(ref, rows, inside, 0, half, heads.half), load_rows(ref, rows, inside, half, half, heads.half)
    )


def load_ready(
    ref: Ref,
    norm_ref: Norm | None,
    rotation_ref: Rotation | None,
    heads: Heads,
    rows: Int[Array, " n"],
    tokens: Int[Array, " n"],
    inside: Bool[Array, " n"] | None,
) -> Halves:
    """The heads `rows` of a matrix of heads, normalised and then rotated by the angles of their `tokens`.

    They have the matrix's dtype, to which the normalised ones are rounded too, as they are where XLA computes them.
    """
    loaded = load_halves(ref, heads, rows, inside)
    if norm_ref is not None:
        loaded = _normalised(loaded, norm_ref, heads)
    if rotation_ref is None:
        return loaded
    half = heads.dim // 2
    cosine = load_rows(rotation_ref.cosine, tokens, inside, 0, half, heads.half)
    sine = load_rows(rotation_ref.sine, tokens, inside, 0, half, heads.half)
    first, second = turn(*loaded, cosine, sine)
    return Halves(first.astype(ref.dtype), second.astype(ref.dtype))


def _normalised(loaded: Halves, norm_ref: Norm, heads: Heads) -> Halves:
    """Heads divided by their root mean squares and multiplied by the weight; zeros stay zeros, padding too."""
    weight_ref: Ref = norm_ref.weight
    half, columns = heads.dim // 2, jnp.arange(heads.half)
    wide = [part.astype(jnp.float32) for part in loaded]
    squares = sum(jnp.sum(part * part, axis=1) for part in wide)
    scale = lax.rsqrt(squares / heads.dim + norm_ref.eps)[:, None]
    normed = []
    for part, first in zip(wide, (0, half), strict=True):
        mask, other = (None, None) if heads.half == half else (columns < half, 0)
        weight = plgpu.load(weight_ref.at[first + columns], mask=mask, other=other).astype(jnp.float32)
        weight = weight + norm_ref.offset if norm_ref.offset else weight
        normed.append((part * scale * weight[None, :]).astype(loaded.first.dtype))
    return Halves(*normed)


def cache_rows(
    page: Int[Array, "*lead"], heads: Heads, head: Int[Array, ""], offset: Int[Array, "*lead"]
) -> Int[Array, "*lead"]:
    """The row of a key in the cache as a matrix [pages * 2 * kv * page_size, dim]; its value is `value_step` later."""
    return ((page * 2) * heads.kv + head) * heads.page_size + offset


def value_step(heads: Heads) -> int:
    """The number of rows from a key to its value."""
    return heads.kv * heads.page_size


def add_keys(
    running: RunningSoftmax,
    queries: Halves,
    positions: Int[Array, " n"],
    cache_ref: Ref,
    page_table_ref: Ref,
    heads: Heads,
    scoring: Scoring,
    *,
    row: Int[Array, ""],
    head: Int[Array, ""],
    first: Int[Array, ""],
    end: Int[Array, ""],
    block: int,
    masked: bool,
    slopes: Float[Array, " n"] | None = None,
) -> RunningSoftmax:
    """The softmax after the `block` cached keys of a row that start at position `first`, except those from `end` on.

    `positions` are those of the queries, `slopes` what their scores times log2(e) fall by with every position. `masked`
    may be False only if every query attends to the whole block.
    """
    places = first + jnp.arange(block)
    inside = places < end if masked else None
    # Positions past the table read any page; a mask would make this load wait for that of `end`.
    column = jnp.minimum(places // heads.page_size, page_table_ref.shape[1] - 1)
    page = plgpu.load(page_table_ref.at[jnp.broadcast_to(row, column.shape), column])
    if inside is not None and scoring.is_limited:
        # Of pages that were given back, which no query attends to, the values may be no numbers.
        inside &= page != PADDING_PAGE
    rows = cache_rows(page, heads, head, places % heads.page_size)
    keys = load_halves(cache_ref, heads, rows, inside)
    keys = Halves(keys.first.astype(queries.first.dtype), keys.second.astype(queries.first.dtype))
    values = load_rows(cache_ref, rows + value_step(heads), inside, 0, heads.dim, heads.padded_dim)
    scores = scoring.log2_scores(queries.dot_transposed(keys))
    if slopes is not None:
        scores += slopes[:, None] * (places[None, :] - positions[:, None]).astype(scores.dtype)
    if inside is not None:
        seen = scoring.visible(positions[:, None], places[None, :]) & inside[None, :]
        scores = jnp.where(seen, scores, MASKED)
    values = values.astype(queries.first.dtype)
    return running.add(scores, lambda weights: plgpu.dot(weights.astype(values.dtype), values))


def whole(arrays: Any) -> Any:
    """Block specs of whole arrays, for a pytree of arrays or shapes that the kernel indexes itself."""
    return jax.tree.map(lambda array: pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape)), arrays)
