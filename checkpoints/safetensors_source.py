"""Tensors of a folder of safetensors files, memory-mapped."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from checkpoints.duplicates import equal_tensors
from checkpoints.error_text import short_repr
from checkpoints.json_file import read_object
from checkpoints.safetensors_file import REMEDY, open_file
from checkpoints.source import TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_NAME = 255  # of a file


class SafetensorsSource:
    """A `TensorSource` over `model.safetensors`, or over the shards that `model.safetensors.index.json` names.

    With links resolved the files must be in the folder or in the hub's cache. ValueError names the file and the tensor
    if a header violates the format, which allows neither overlaps nor gaps; and both files if a tensor is in two of
    them with different values.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX_FILE
        if os.path.lexists(index):
            self._arrays, files = _open_shards(folder, index)
            if SINGLE_FILE not in files and os.path.lexists(folder / SINGLE_FILE):
                _require_equal(folder, self._arrays, open_file(folder / SINGLE_FILE))
        elif os.path.lexists(folder / SINGLE_FILE):
            self._arrays = open_file(folder / SINGLE_FILE)
        else:
            present = sorted(path.name for path in folder.glob("*.safetensors")) or "no .safetensors file"
            raise ValueError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; it holds {present!s:.1000}")
        self.info: Mapping[str, TensorInfo] = {
            name: TensorInfo(array.shape, array.dtype.name) for name, array in self._arrays.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A read-only view of one part of the mapped file."""
        return self._arrays[name][index]


def _open_shards(folder: Path, index: Path) -> tuple[dict[str, npt.NDArray[Any]], Collection[str]]:
    """Every tensor that the index names, and the names of its files."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no 'weight_map' from tensor names to file names. {REMEDY}")
    shards: dict[str, dict[str, npt.NDArray[Any]]] = {}
    arrays = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            if Path(shard).name != shard or not shard.isprintable() or len(shard) > MAX_NAME:
                raise ValueError(
                    f"{index} places {short_repr(name)} in {short_repr(shard)}, which is not a file of its own folder. "
                    f"{REMEDY}"
                )
            if not os.path.lexists(folder / shard):
                raise ValueError(
                    f"{folder / shard} is missing; {INDEX_FILE} places {short_repr(name)} in it. Download it too"
                )
            shards[shard] = open_file(folder / shard)
        if name not in shards[shard]:
            raise ValueError(
                f"{folder / shard} does not hold {short_repr(name)}, though {INDEX_FILE} places it there. {REMEDY}"
            )
        arrays[name] = shards[shard][name]
    for shard, tensors in shards.items():
        for name in tensors.keys() & arrays.keys():
            if weight_map[name] != shard and not _is_equal(tensors[name], arrays[name]):
                raise ValueError(
                    f"{folder}: {short_repr(name)} differs between {weight_map[name]}, where {INDEX_FILE} places it, "
                    f"and {shard}. {REMEDY}"
                )
    return arrays, shards.keys()


def _require_equal(
    folder: Path, sharded: Mapping[str, npt.NDArray[Any]], single: Mapping[str, npt.NDArray[Any]]
) -> None:
    """ValueError unless both hold the same tensors, because readers disagree about which of them is the model."""
    different = sorted(sharded.keys() ^ single.keys()) or [
        name for name, array in sharded.items() if not _is_equal(array, single[name])
    ]
    if different:
        raise ValueError(
            f"{folder} holds two models, {SINGLE_FILE} and the shards of {INDEX_FILE}, which differ in "
            f"{short_repr(different[0])}: remove the one that is not meant"
        )


def _is_equal(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> bool:
    one, other = (TensorInfo(array.shape, array.dtype.name) for array in (first, second))
    return equal_tensors(first.__getitem__, second.__getitem__, one, other)
