"""Parameters on the devices: from a checkpoint, each shard read straight from the file, or drawn at random."""

import itertools
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding

from checkpoints.fit import require_fit
from checkpoints.packed_source import PackedSource
from checkpoints.shards import read_shard
from checkpoints.source import TensorSource
from checkpoints.table import Params, Sizes, SpecOf, Weight, assemble, blocks, expand, piece_size, shape

Progress = Callable[[int, int], None]

# Buffers that some checkpoints carry although they follow from the configuration.
IGNORED = ("*.rotary_emb.inv_freq", "*.attn.masked_bias", "*.attention.masked_bias")

# Dequantising is numpy arithmetic that releases the interpreter lock; each thread holds one shard of one weight.
MAX_THREADS = 8

DUMMY_SCALE = 0.02


def load_params(
    table: Iterable[Weight],
    source: TensorSource,
    *,
    sizes: Sizes,
    padded: Sizes,
    mesh: Mesh,
    spec_of: SpecOf,
    dtype: npt.DTypeLike,
    progress: Progress | None = None,
    ignore: Sequence[str] = IGNORED,
) -> Params:
    """The parameters of `table`, sharded over `mesh` as `spec_of(logical axes)` says, in `dtype`; padding is zero.

    `sizes` has the true size of every logical axis and of `layers`, `padded` the size of the axes that are padded.
    Before anything is read the names and shapes of all rows are checked: one ValueError lists every missing tensor,
    every tensor that no row uses and no `ignore` pattern (as in fnmatch) matches, and every wrong shape.
    `progress(done, total)` is called in this thread after each weight, in bytes of the finished parameters. The host
    holds one shard of a few weights at a time, and the arrays never share memory with the file.
    """
    rows = expand(table, sizes["layers"])
    source = as_hugging_face(source, rows, sizes)
    check(rows, source, sizes=sizes, ignore=ignore)

    def load(row: Weight) -> jax.Array:
        return _load(row, source, sizes, padded, NamedSharding(mesh, spec_of(row.axis_names)), np.dtype(dtype))

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        return _collect(rows, threads.map(load, rows), _total_bytes(rows, sizes, padded, dtype), progress)


def check(rows: Iterable[Weight], source: TensorSource, *, sizes: Sizes, ignore: Sequence[str] = IGNORED) -> None:
    """ValueError unless the source holds exactly the tensors of the expanded rows, in their shapes."""
    require_fit({block.name: block.stored_shape for row in rows for block in blocks(row, sizes)}, source.info, ignore)


def as_hugging_face(source: TensorSource, rows: Sequence[Weight], sizes: Sizes) -> TensorSource:
    """The source under Hugging Face's names, which Orbax's arrays lack; ValueError where these do not fit the rows."""
    from checkpoints.orbax_source import OrbaxSource  # tensorstore is for those who need it

    return PackedSource(source, rows, sizes) if isinstance(source, OrbaxSource) else source


def ignorable(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that a checkpoint of this config.json may hold although nothing reads them."""
    # Many files of models with tied embeddings hold the tied copy too.
    return (*IGNORED, "lm_head.weight") if config.get("tie_word_embeddings") else IGNORED


def dummy_params(
    table: Iterable[Weight],
    *,
    sizes: Sizes,
    padded: Sizes,
    mesh: Mesh,
    spec_of: SpecOf,
    dtype: npt.DTypeLike,
    progress: Progress | None = None,
) -> Params:
    """Parameters of the same shapes and shardings, drawn on the devices from a normal distribution of scale 0.02.

    A value depends on the weight's path and true sizes only, not on the mesh; padding is zero.
    """
    rows = expand(table, sizes["layers"])

    @cache  # equal weights of all layers share one compiled program
    def program(pieces: tuple[_Piece, ...], axis: int, sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(partial(_draw, pieces=pieces, axis=axis, dtype=np.dtype(dtype)), out_shardings=sharding)

    def draw(row: Weight) -> jax.Array:
        pieces = tuple(
            (tuple(piece_size(row, part, sizes).values()), tuple(piece_size(row, part, sizes, padded).values()))
            for part in row.stored
        )
        axis = row.axis_names.index(row.fuse) if row.fuse is not None else 0
        key = jax.random.key(zlib.crc32(row.path.encode()))
        return program(pieces, axis, NamedSharding(mesh, spec_of(row.axis_names)))(key)

    return _collect(rows, map(draw, rows), _total_bytes(rows, sizes, padded, dtype), progress)


def _total_bytes(rows: Iterable[Weight], sizes: Sizes, padded: Sizes, dtype: npt.DTypeLike) -> int:
    return sum(math.prod(shape(row, sizes, padded)) for row in rows) * np.dtype(dtype).itemsize


def _collect(rows: Sequence[Weight], arrays: Iterable[jax.Array], total: int, progress: Progress | None) -> Params:
    leaves = []
    done = 0
    for row, array in zip(rows, arrays, strict=True):
        leaves.append((row.path, array))
        done += array.nbytes
        if progress is not None:
            progress(done, total)
    return assemble(leaves)


def _load(
    row: Weight, source: TensorSource, sizes: Sizes, padded: Sizes, sharding: NamedSharding, dtype: np.dtype[Any]
) -> jax.Array:
    whole = shape(row, sizes, padded)
    places = blocks(row, sizes, padded)
    devices_of = defaultdict(list)  # a shard that several devices hold is read once
    for device, index in sharding.addressable_devices_indices_map(whole).items():
        window = tuple(part.indices(length)[:2] for part, length in zip(index or (), whole, strict=True))
        devices_of[window].append(device)
    arrays: list[jax.Array] = []
    for window, devices in devices_of.items():
        shard = read_shard(row.axis_names, places, source, window, dtype)
        arrays.extend(jax.device_put(shard, device) for device in devices)
    array = jax.make_array_from_single_device_arrays(whole, sharding, arrays)
    return array.block_until_ready()  # so that the host's copies do not pile up behind the transfers


_Piece = tuple[tuple[int, ...], tuple[int, ...]]  # the true shape, and the shape it is padded to


def _draw(key: jax.Array, *, pieces: tuple[_Piece, ...], axis: int, dtype: np.dtype[Any]) -> jax.Array:
    ends = list(itertools.accumulate(true[axis] for true, _ in pieces))
    extents = [*pieces[0][0]]
    extents[axis] = ends[-1]
    # One draw for all pieces: each takes half a second to compile.
    values = (DUMMY_SCALE * jax.random.normal(key, extents)).astype(dtype)
    parts = [
        jnp.pad(part, [(0, wide - size) for size, wide in zip(true, room, strict=True)])
        for part, (true, room) in zip(jnp.split(values, ends[:-1], axis), pieces, strict=True)
    ]
    return jnp.concatenate(parts, axis)
