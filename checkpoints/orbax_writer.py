"""Writes a model's parameters as an Orbax checkpoint, a piece at a time.

Orbax itself needs every array in memory. Here it saves the tree with a scalar in place of each array, which writes all
of its metadata; tensorstore, the library that Orbax writes arrays with, then replaces the scalars by the arrays.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import orbax.checkpoint as ocp
import tensorstore as ts

from checkpoints.error_text import one_line
from checkpoints.load import Progress
from checkpoints.pieces import cast, chunk_shape, grid
from checkpoints.shards import read_shard
from checkpoints.source import TensorInfo, TensorSource
from checkpoints.table import Sizes, Weight, assemble, blocks, shape
from sharding import Extents


def array_infos(
    rows: Sequence[Weight], source: TensorSource, sizes: Sizes, dtype: npt.DTypeLike | None
) -> dict[str, TensorInfo]:
    """The arrays of `write_orbax` by path, in `dtype`, else in the narrowest one that holds all tensors of an array."""
    extents = Extents(sizes)

    def common(row: Weight) -> str:
        stored = (np.dtype(source.info[block.name].dtype) for block in blocks(row, extents))
        return np.dtype(dtype or reduce(jnp.promote_types, stored)).name

    return {row.path: TensorInfo(shape(row, extents), common(row)) for row in rows}


def write_orbax(
    rows: Sequence[Weight],
    source: TensorSource,
    folder: Path,
    *,
    sizes: Sizes,
    infos: Mapping[str, TensorInfo],
    split: frozenset[str],
    progress: Progress | None = None,
) -> None:
    """The arrays of the expanded `rows`, unpadded, as an Orbax checkpoint in `folder`, which must not exist yet.

    `infos` is the result of `array_infos`, and `split` has the logical axes that meshes split. `progress(done, total)`
    counts bytes written. At most a few pieces of PIECE_BYTES are in memory. OSError where writing fails.
    """
    tree = assemble((path, np.zeros((), info.dtype)) for path, info in infos.items())
    # If interrupted here, Orbax would continue in its own threads; this block waits until they are done.
    with ocp.PyTreeCheckpointer() as checkpointer, ThreadPoolExecutor(1) as thread:
        thread.submit(checkpointer.save, folder.resolve(), tree).result()
    total = sum(info.nbytes for info in infos.values())
    done = 0
    for row in rows:
        info = infos[row.path]
        places = blocks(row, Extents(sizes))
        held = reduce(jnp.promote_types, (np.dtype(source.info[block.name].dtype) for block in places))
        chunk = chunk_shape(row.axis_names, info.shape, split, np.dtype(info.dtype).itemsize)
        store = _create(folder, row.path, info, chunk)
        for window in grid(info.shape, chunk):
            values = cast(read_shard(row.axis_names, places, source, window, held), info.dtype, row.path)
            _write(store[tuple(slice(*part) for part in window)], values, f"{folder}: the array {row.path!r}")
            done += values.nbytes
            if progress is not None:
                progress(done, total)


def _write(place: ts.TensorStore, values: npt.NDArray[Any], what: str) -> None:
    writing = place.write(values)
    try:
        writing.result()
    except ValueError as error:  # raised for a full disk, too
        raise OSError(f"{what}: {one_line(str(error).partition(' [')[0], 300)}") from error
    finally:
        writing.exception()  # waits for the write, which an interrupt does not stop


def _create(folder: Path, path: str, info: TensorInfo, chunk: tuple[int, ...]) -> ts.TensorStore:
    files = {"driver": "file", "path": f"{folder.resolve()}/"}
    spec: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": files, "path": f"{path}/"},
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(
        spec,
        create=True,
        delete_existing=True,
        dtype=ts.dtype(info.dtype),
        shape=info.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
        codec=ts.CodecSpec({"driver": "zarr", "compressor": None}),
    ).result()
