"""Arrays that Orbax saved, any part of which is read on its own.

Orbax restores whole arrays; tensorstore, which Orbax writes with, reads boxes. The layout is Orbax's own: `_METADATA`
lists the arrays, which are zarr arrays inside one OCDBT database or in a folder each.
"""

import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from checkpoints.error_text import one_line, short_repr
from checkpoints.json_file import read_object
from checkpoints.orbax_folder import METADATA_FILE
from checkpoints.source import TensorInfo


class OrbaxSource:
    """A `TensorSource` over Orbax's arrays, under the paths of our parameters ("layers.0.qkv").

    ValueError, naming the folder and the array, where the folder is damaged or incomplete. No file outside it is read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bytes = _size_of_files(folder)
        metadata = read_object(folder / METADATA_FILE)
        opened = {name: ts.open(spec) for name, spec in self._specs(metadata).items()}
        self._arrays: dict[str, ts.TensorStore] = {}
        for name, future in opened.items():
            try:
                self._arrays[name] = future.result()
            except (ValueError, OSError) as error:
                raise self._unreadable(name, error) from error
        self.info: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(array.shape), array.dtype.numpy_dtype.name) for name, array in self._arrays.items()
        }
        self._check_sizes()

    def read(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A new array with one part; only the chunks that hold it are read from the files."""
        # tensorstore raises on bounds that Python would clip.
        box = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, self.info[name].shape, strict=True))
        try:
            return np.asarray(self._arrays[name][box].read().result())
        except (ValueError, OSError) as error:
            raise self._unreadable(name, error) from error

    def _specs(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        files = {"driver": "file", "path": f"{self._folder.resolve()}/"}

        def spec(name: str) -> dict[str, Any]:
            store: dict[str, Any] = files | {"path": f"{files['path']}{name}/"}
            if metadata.get("use_ocdbt", True):
                store = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
            # A missing chunk would be read as zeros, although Orbax writes all chunks.
            complete = metadata.get("store_array_data_equal_to_fill_value") is True
            return {"driver": driver, "kvstore": store, "open": True, "fill_missing_data_reads": not complete}

        return {name: spec(name) for name in self._names(metadata)}

    def _names(self, metadata: Mapping[str, Any]) -> list[str]:
        try:
            keys = [[key["key"] for key in entry["key_metadata"]] for entry in metadata["tree_metadata"].values()]
            names = [".".join(map(str, path)) for path in keys]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{self._folder / METADATA_FILE} is not Orbax's list of arrays") from error
        for name in names:
            if not name or name.startswith(".") or "/" in name or "\0" in name:
                raise ValueError(
                    f"{self._folder / METADATA_FILE} names an array {short_repr(name)}, which is no array's name"
                )
        return names

    def _check_sizes(self) -> None:
        """Compare the sizes in the metadata with those of the files before anything is read."""
        stated = 0
        for name, array in self._arrays.items():
            chunk = array.chunk_layout.read_chunk.shape or ()
            if any((part or 0) > max(1, size) for part, size in zip(chunk, array.shape, strict=True)):
                raise ValueError(f"{self._folder}: the array {name!r} of {array.shape} has chunks of {chunk}")
            if _is_plain(array):
                stated += math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
        if stated > self._bytes:
            raise ValueError(
                f"{self._folder} is incomplete: its arrays have {stated} bytes, its files {self._bytes}; copy or "
                "convert the model again"
            )

    def _unreadable(self, name: str, error: Exception) -> ValueError:
        reason = str(error).partition(" [")[0]
        return ValueError(
            f"{self._folder}: the array {name!r} cannot be read; the folder is damaged or incomplete, copy or convert "
            f"the model again ({one_line(reason, 300)})"
        )


def _is_plain(array: ts.TensorStore) -> bool:
    """Whether the array is stored uncompressed, so that its sizes on disk and in memory are equal."""
    codec = array.codec
    return codec is not None and codec.to_json().get("compressor", "other") is None


def _size_of_files(folder: Path) -> int:
    """The size of all files in bytes; ValueError where one is a link, a pipe or a device."""
    size = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(parent, name))
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise ValueError(
                    f"{folder} holds {short_repr(name)}, which is no regular file; put a copy in its place"
                )
            size += status.st_size
    return size
