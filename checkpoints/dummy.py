"""Parameters on the devices without a checkpoint, drawn at random."""

import itertools
import zlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.sharding import NamedSharding

from checkpoints.load import Progress, as_leaf, collect, own_dtype
from checkpoints.table import Params, Stored, Weight, expand, leaf_shape, piece_size, stored_size
from sharding import Extents, ShardingRules

SCALE = 0.02


class _Piece(NamedTuple):
    """A part of an array: as it is drawn, as a tensor of it would be read, and with what is repeated and padded."""

    drawn: tuple[int, ...]
    read: tuple[int, ...]
    times: tuple[int, ...]
    padded: tuple[int, ...]


def dummy_params(
    table: Iterable[Weight],
    *,
    extents: Extents,
    rules: ShardingRules,
    dtype: npt.DTypeLike,
    progress: Progress | None = None,
) -> Params:
    """Parameters of the shapes and shardings that `load_params` gives, from a normal distribution of scale 0.02.

    A value depends on the weight's path and true sizes only, not on the mesh; padding is zero.
    """
    rows = expand(table, extents["layers"])

    @cache  # equal weights of all layers share one compiled program
    def program(
        pieces: tuple[_Piece, ...], axis: int | None, dtype: np.dtype[Any], sharding: NamedSharding
    ) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(partial(_draw, pieces=pieces, axis=axis, dtype=dtype), out_shardings=sharding)

    def draw(row: Weight) -> Any:
        pieces = tuple(_piece(row, stored, extents) for stored in row.stored)
        axis = row.axis_names.index(row.fuse) if row.fuse is not None else None
        key = jax.random.key(zlib.crc32(row.path.encode()))
        array = program(pieces, axis, own_dtype(row, dtype), rules.sharding(row.axis_names))(key)
        return as_leaf(array, row, leaf_shape(row, extents, rules, dtype))

    return collect(rows, map(draw, rows), extents, rules, dtype, progress)


def _piece(row: Weight, stored: Stored, extents: Extents) -> _Piece:
    size, times = stored_size(row, stored, extents)
    return _Piece(
        drawn=tuple(stored_size(row, stored, Extents(extents.sizes))[0].values()),
        read=tuple(size.values()),
        times=tuple(times.get(axis, 1) for axis in size),
        padded=tuple(piece_size(row, stored, extents).values()),
    )


def _draw(key: jax.Array, *, pieces: tuple[_Piece, ...], axis: int | None, dtype: np.dtype[Any]) -> jax.Array:
    if axis is None:
        (piece,) = pieces
        return _placed((SCALE * jax.random.normal(key, piece.drawn)).astype(dtype), piece)
    ends = list(itertools.accumulate(piece.drawn[axis] for piece in pieces))
    extents = [*pieces[0].drawn]
    extents[axis] = ends[-1]
    # One draw for all pieces: each takes half a second to compile.
    values = (SCALE * jax.random.normal(key, extents)).astype(dtype)
    parts = zip(jnp.split(values, ends[:-1], axis), pieces, strict=True)
    return jnp.concatenate([_placed(part, piece) for part, piece in parts], axis)


def _placed(part: jax.Array, piece: _Piece) -> jax.Array:
    part = part.reshape(piece.read)
    for axis, times in enumerate(piece.times):
        part = jnp.repeat(part, times, axis)
    room = [(0, padded - size, 0) for size, padded in zip(part.shape, piece.padded, strict=True)]
    return lax.pad(part, jnp.zeros((), part.dtype), room)
