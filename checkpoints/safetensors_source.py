"""Tensors of a folder of safetensors files, memory-mapped.

The safetensors package checks and slices well, but its numpy side cannot give the float8 types; the format is a length,
a JSON header and the bytes: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from checkpoints.json_file import read_object
from checkpoints.source import TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES: Mapping[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class SafetensorsSource:
    """A `TensorSource` over `model.safetensors`, or over the shards that `model.safetensors.index.json` names."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX_FILE
        if index.is_file():
            self._arrays = _open_shards(folder, index)
        elif (folder / SINGLE_FILE).is_file():
            self._arrays = _open_file(folder / SINGLE_FILE)
        else:
            present = sorted(path.name for path in folder.glob("*.safetensors")) or "no .safetensors file"
            raise ValueError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; it holds {present}")
        self.info: Mapping[str, TensorInfo] = {
            name: TensorInfo(array.shape, array.dtype.name) for name, array in self._arrays.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A read-only view of that part of the mapped file."""
        return self._arrays[name][index]


class _Entry(NamedTuple):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


def _open_shards(folder: Path, index: Path) -> dict[str, npt.NDArray[Any]]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no 'weight_map' from tensor names to file names")
    shards: dict[str, dict[str, npt.NDArray[Any]]] = {}
    arrays = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{index} places {name!r} in {shard!r}, which is not a file of its own folder")
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard} is missing; {INDEX_FILE} places {name!r} in it")
            shards[shard] = _open_file(folder / shard)
        if name not in shards[shard]:
            raise ValueError(f"{folder / shard} does not hold {name!r}, though {INDEX_FILE} places it there")
        arrays[name] = shards[shard][name]
    return arrays


def _open_file(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of one file, as a view of the mapped file."""
    if path.stat().st_size < 8:
        raise ValueError(f"{path} is truncated: it has no safetensors header")
    # A plain array over the mapping: slices of numpy's memmap class cost several times more.
    mapped = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    header_size = int(mapped[:8].view("<u8")[0])
    if header_size > MAX_HEADER_BYTES:
        raise ValueError(f"{path} is not a safetensors file: it states a header of {header_size} bytes")
    data = mapped[8 + header_size :]
    if 8 + header_size > mapped.size:
        raise ValueError(f"{path} is truncated: its header should have {header_size} bytes")
    try:
        header = json.loads(mapped[8 : 8 + header_size].tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a JSON object")
    return {name: _view(path, name, entry, data) for name, entry in header.items() if name != "__metadata__"}


def _view(path: Path, name: str, stated: Any, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    entry = _checked(path, name, stated)
    dtype = np.dtype(DTYPES[entry.dtype])
    begin, end = entry.data_offsets
    if end > data.size:
        raise ValueError(f"{path} is truncated: {name!r} should end at byte {end} of its data, which has {data.size}")
    if end - begin != math.prod(entry.shape) * dtype.itemsize:
        raise ValueError(f"{path}: {name!r} has bytes {begin} to {end}, which do not fit {entry.dtype} {entry.shape}")
    return data[begin:end].view(dtype).reshape(entry.shape)


def _checked(path: Path, name: str, stated: Any) -> _Entry:
    malformed = ValueError(f"{path}: the header entry of {name!r} is malformed: {stated!r:.200}")
    try:
        entry = _Entry(str(stated["dtype"]), stated["shape"], stated["data_offsets"])
        numbers = (*entry.shape, *entry.data_offsets)
    except (KeyError, TypeError) as error:
        raise malformed from error
    if len(entry.data_offsets) != 2 or not all(type(number) is int and number >= 0 for number in numbers):
        raise malformed
    if entry.dtype not in DTYPES:
        raise ValueError(f"{path}: {name!r} is stored as {entry.dtype}; supported: {', '.join(DTYPES)}")
    return entry
