"""One memory-mapped safetensors file.

The safetensors package checks and slices well, but its numpy side cannot give the float8 types; the format is a length,
a JSON header and the bytes: https://github.com/huggingface/safetensors#format
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from checkpoints.error_text import short_repr
from checkpoints.json_file import decode
from checkpoints.regular_file import map_regular

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 16
MAX_VALUES = 2**59  # in bytes too few for numpy to overflow, of the longest type

REMEDY = "Download or convert the model again"

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


class _Entry(NamedTuple):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


def open_file(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of one file, as a view of the mapped file."""
    # A plain array over the mapping: slices of numpy's memmap class cost several times more.
    mapped = np.frombuffer(map_regular(path, path.parent), np.uint8)
    if mapped.size < 8:
        raise ValueError(f"{path} is truncated: it has no safetensors header. {REMEDY}")
    header_size = int(mapped[:8].view("<u8")[0])
    if header_size > MAX_HEADER_BYTES:
        raise ValueError(f"{path} is not a safetensors file: it states a header of {header_size} bytes. {REMEDY}")
    data = mapped[8 + header_size :]
    if 8 + header_size > mapped.size:
        raise ValueError(f"{path} is truncated: its header should have {header_size} bytes. {REMEDY}")
    try:
        header = decode(mapped[8 : 8 + header_size].tobytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not a safetensors file: its header is not valid JSON ({error}). {REMEDY}"
        ) from error
    if not isinstance(header, dict) or mapped[8] != ord("{"):
        raise ValueError(f"{path} is not a safetensors file: its header is not a JSON object. {REMEDY}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(
            f"{path} has a '__metadata__' that is not an object of texts: {short_repr(metadata)}. {REMEDY}"
        )
    entries = {name: _validate_entry(path, name, stated) for name, stated in header.items()}
    _check_layout(path, entries, data.size)
    return {
        name: data[slice(*entry.data_offsets)].view(DTYPES[entry.dtype]).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _validate_entry(path: Path, name: str, stated: Any) -> _Entry:
    if not isinstance(stated, dict) or stated.keys() != set(_Entry._fields) or not _is_valid_layout(**stated):
        raise ValueError(f"{path}: the header entry of {short_repr(name)} is malformed: {short_repr(stated)}. {REMEDY}")
    entry = _Entry(**stated)
    if entry.dtype not in DTYPES:
        raise ValueError(
            f"{path}: {short_repr(name)} is stored as {short_repr(entry.dtype)}; supported: {', '.join(DTYPES)}. "
            "Convert the model to one of these"
        )
    begin, end = entry.data_offsets
    if end - begin != math.prod(entry.shape) * np.dtype(DTYPES[entry.dtype]).itemsize:
        raise ValueError(
            f"{path}: {short_repr(name)} has bytes {begin} to {end}, which do not fit {entry.dtype} {entry.shape}. "
            f"{REMEDY}"
        )
    return entry


def _is_valid_layout(dtype: Any, shape: Any, data_offsets: Any) -> bool:
    """Whether the fields have the right types, and sizes that do not overflow in numpy even for an empty array."""
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(data_offsets, list):
        return False
    if len(shape) > MAX_DIMENSIONS or len(data_offsets) != 2:
        return False
    if not all(type(number) is int and 0 <= number <= MAX_VALUES for number in (*shape, *data_offsets)):
        return False
    return math.prod(size for size in shape if size) <= MAX_VALUES


def _check_layout(path: Path, entries: Mapping[str, _Entry], size: int) -> None:
    """ValueError unless every byte of the data belongs to one tensor, as the format demands against hidden content."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if end > size:
            raise ValueError(
                f"{path} is truncated: {short_repr(name)} should end at byte {end} of its data, which has {size}. "
                f"{REMEDY}"
            )
        if begin != at:
            raise ValueError(
                f"{path} is damaged: {short_repr(name)} begins at byte {begin} of its data, not at byte {at}: tensors "
                f"may neither overlap nor leave gaps. {REMEDY}"
            )
        at = end
    if at != size:
        raise ValueError(f"{path} is damaged: its tensors end at byte {at} of its data, which has {size}. {REMEDY}")
