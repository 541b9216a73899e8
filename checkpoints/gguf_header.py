"""The header of a GGUF file: its metadata and the locations of its tensors.

The gguf package's reader makes several numpy arrays for every string, which takes seconds for a vocabulary; this one
parses the same bytes in milliseconds. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from checkpoints.error_text import short_repr

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4

# Far above published models. Values of the header are held in memory, where a number takes up to 18 times its bytes.
MAX_HEADER_BYTES = 64 << 20
MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 17

REMEDY = "Download or convert the model again"

_SCALARS: Mapping[int, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}

_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: in GGUF.
        shape: outermost dimension first.
        type: of its blocks.
        offset: of its data in the file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def nbytes(self) -> int:
        """The size of its data in the file."""
        block_size, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block_size * block_bytes


class GgufHeader:
    """The parsed header: `metadata` by key and `tensors` by name.

    ValueError, naming the file, where it is damaged or not supported.
    """

    def __init__(self, path: Path, content: memoryview) -> None:
        self._path = path
        self._file_size = len(content)
        self._content = content[:MAX_HEADER_BYTES]
        self._at = 0
        try:
            if bytes(self._read(4)) != MAGIC:
                raise ValueError(f"{path} is not a GGUF file: it does not start with {MAGIC.decode()}")
            version = self._number("<u4")
            if version & 0xFFFF == 0:
                raise ValueError(f"{path} is a big-endian GGUF file; only little-endian ones are read")
            if version not in VERSIONS:
                raise ValueError(f"{path} is GGUF version {version}; supported: {VERSIONS}")
            tensor_count = self._count("tensors", MAX_TENSORS)
            self.metadata = self._metadata(self._count("metadata values", MAX_METADATA))
            self.tensors = self._tensors(tensor_count)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged: text before byte {self._at} is not UTF-8. {REMEDY}") from error

    def _count(self, what: str, maximum: int) -> int:
        count: int = self._number("<u8")
        if count > maximum:
            raise ValueError(f"{self._path} states {count} {what}; at most {maximum} are read. {REMEDY}")
        return count

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"{self._path} is damaged: it states {short_repr(key)} twice. {REMEDY}")
            metadata[key] = self._value(key, self._number("<u4"))
        return metadata

    def _value(self, key: str, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind == GGUFValueType.ARRAY:
            item, count = self._number("<u4"), self._number("<u8")
            if item == GGUFValueType.STRING:
                return self._strings(count)
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                return np.frombuffer(self._read(count * dtype.itemsize), dtype).tolist()
            raise ValueError(f"{self._path}: {short_repr(key)} is an array of type {item}, which is not read. {REMEDY}")
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        raise ValueError(f"{self._path}: {short_repr(key)} is of the unknown type {kind}. {REMEDY}")

    def _tensors(self, count: int) -> dict[str, GgufTensor]:
        entries = [
            (
                self._string(),
                [self._number("<u8") for _ in range(self._dimensions())],
                self._number("<u4"),
                self._number("<u8"),
            )
            for _ in range(count)
        ]
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(
                f"{self._path}: 'general.alignment' is {short_repr(alignment)}; it must be a power of two. {REMEDY}"
            )
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, innermost_first, kind, offset in entries:
            if name in tensors:
                raise ValueError(f"{self._path} is damaged: it holds the tensor {short_repr(name)} twice. {REMEDY}")
            if offset % alignment:
                raise ValueError(
                    f"{self._path} is damaged: the tensor {short_repr(name)} is {offset} bytes into the data, which is "
                    f"no multiple of the alignment {alignment}. {REMEDY}"
                )
            tensors[name] = self._tensor(name, tuple(innermost_first[::-1]), kind, start + offset)
        self._check_overlaps(tensors)
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        try:
            tensor = GgufTensor(name, shape, GGMLQuantizationType(kind), offset)
        except ValueError as error:
            raise ValueError(
                f"{self._path}: the tensor {short_repr(name)} is of the unknown type {kind}. {REMEDY}"
            ) from error
        block_size, _ = GGML_QUANT_SIZES[tensor.type]
        if not shape or 0 in shape or shape[-1] % block_size:
            raise ValueError(
                f"{self._path}: the tensor {short_repr(name)} has the shape {shape}; {tensor.type.name} needs rows of "
                f"a multiple of {block_size}, and no size may be 0. {REMEDY}"
            )
        if offset + tensor.nbytes > self._file_size:
            raise ValueError(
                f"{self._path} is truncated: the tensor {short_repr(name)} should end at byte "
                f"{offset + tensor.nbytes}, the file has {self._file_size}. {REMEDY}"
            )
        return tensor

    def _check_overlaps(self, tensors: Mapping[str, GgufTensor]) -> None:
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for tensor, following in itertools.pairwise(in_order):
            if following.offset < tensor.offset + tensor.nbytes:
                raise ValueError(
                    f"{self._path} is damaged: the tensors {short_repr(tensor.name)} and {short_repr(following.name)} "
                    f"overlap. {REMEDY}"
                )

    def _dimensions(self) -> int:
        count = self._number("<u4")
        if count > MAX_DIMENSIONS:
            raise ValueError(f"{self._path} is damaged: it states a tensor of {count} dimensions. {REMEDY}")
        return count

    def _read(self, count: int) -> memoryview:
        part = self._content[self._at : self._at + count]
        if len(part) != count:
            raise self._truncated()
        self._at += count
        return part

    def _truncated(self) -> ValueError:
        end = len(self._content)
        if end < self._file_size:
            return ValueError(f"{self._path} has a header of more than {end} bytes, which is not read. {REMEDY}")
        return ValueError(f"{self._path} is truncated: its header goes on past byte {end}. {REMEDY}")

    def _number(self, dtype: str) -> Any:
        return np.frombuffer(self._read(np.dtype(dtype).itemsize), dtype)[0].item()

    def _string(self) -> str:
        return str(self._read(self._number("<u8")), "utf-8")

    def _strings(self, count: int) -> list[str]:
        """An array of texts, in one loop that is written for speed: a vocabulary has a hundred thousand of them."""
        content, size, at = self._content, len(self._content), self._at
        strings = []
        for _ in range(count):
            if at + _U64.size > size:
                break
            (length,) = _U64.unpack_from(content, at)
            at += _U64.size + length
            if at > size:
                break
            strings.append(str(content[at - length : at], "utf-8"))
        if len(strings) < count:
            raise self._truncated()
        self._at = at
        return strings
