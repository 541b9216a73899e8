"""The tensors of a GGUF file under Hugging Face names, dequantised when they are read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from checkpoints.error_text import short_repr
from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.gguf_config import model_config
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_header import REMEDY, GgufTensor
from checkpoints.gguf_names import ROPE_FACTORS, hugging_face_name
from checkpoints.source import TensorInfo

_PLAIN: Mapping[GGMLQuantizationType, npt.DTypeLike] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
}
_QUANTISED = frozenset(
    GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
)

# Values dequantised in one numpy call: few calls, and the intermediate results still fit the processor's cache.
_CHUNK = 1 << 18


class _Stored(NamedTuple):
    tensor: GgufTensor
    heads: int | None  # of a tensor whose rows are permuted within each head
    plus_one: bool
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what reading it gives."""
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    @property
    def dtype(self) -> str:
        """The numpy name of what reading it gives."""
        return np.dtype(np.float32 if self.plus_one else _PLAIN.get(self.tensor.type, np.float32)).name


class GgufSource:
    """A `TensorSource` over a GGUF file.

    Quantised tensors and those that are stored plus one are read as float32, others in their stored dtype.
    """

    def __init__(self, file: GgufFile, architecture: GgufArchitecture) -> None:
        self._file = file
        config = model_config(file, architecture)
        self._stored: dict[str, _Stored] = {}
        self.info: Mapping[str, TensorInfo] = {}
        for tensor in file.tensors.values():
            if tensor.name == ROPE_FACTORS:
                continue  # part of the configuration
            _check_type(file, tensor)
            name = hugging_face_name(tensor.name, architecture)
            if name in self._stored:
                both = f"{short_repr(self._stored[name].tensor.name)} and {short_repr(tensor.name)}"
                raise ValueError(f"{file.path} is damaged: {both} are the same tensor. {REMEDY}")
            counts = (count for module, count in architecture.permuted.items() if f".{module}." in name)
            heads = next((config[count] for count in counts), None)
            if heads is not None and tensor.shape[0] % (2 * heads):
                raise ValueError(
                    f"{file.path}: {short_repr(tensor.name)} has {tensor.shape[0]} rows, which {heads} heads of two "
                    f"halves do not divide. {REMEDY}"
                )
            plus_one = architecture.norms_plus_one and name.endswith("norm.weight")
            transposed = name.endswith(tuple(f".{module}.weight" for module in architecture.transposed))
            self._stored[name] = _Stored(tensor, heads, plus_one, transposed)
        self.info = {name: TensorInfo(one.shape, one.dtype) for name, one in self._stored.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """One part of a tensor; only the blocks that hold it are dequantised."""
        tensor, heads, plus_one, transposed = self._stored[name]
        values = self._values(tensor, heads, index[::-1]).T if transposed else self._values(tensor, heads, index)
        return values.astype(np.float32) - np.float32(1) if plus_one else values

    def _values(self, tensor: GgufTensor, heads: int | None, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        *outer, columns = (range(length)[part] for part, length in zip(index, tensor.shape, strict=True))
        data = self._file.data(tensor)
        if tensor.type in _PLAIN:
            plain = data.view(_PLAIN[tensor.type])[..., 0]
            return _take(plain, [*outer, columns], heads)
        block_size, _ = GGML_QUANT_SIZES[tensor.type]
        first = columns.start // block_size
        touched = range(first, -(-columns.stop // block_size))
        values = _dequantise(_take(data, [*outer, touched], heads), tensor.type)
        return values[..., columns.start - first * block_size : columns.stop - first * block_size]


def _check_type(file: GgufFile, tensor: GgufTensor) -> None:
    if tensor.type not in _PLAIN and tensor.type not in _QUANTISED:
        supported = ", ".join(kind.name for kind in GGMLQuantizationType if kind in _PLAIN or kind in _QUANTISED)
        raise ValueError(
            f"{file.path}: the tensor {short_repr(tensor.name)} is stored as {tensor.type.name}; supported: "
            f"{supported}. Convert the model to one of these"
        )
    if tensor.type in _QUANTISED and len(tensor.shape) == 1:
        raise ValueError(
            f"{file.path}: the vector {short_repr(tensor.name)} is stored as {tensor.type.name}; it must be a float. "
            f"{REMEDY}"
        )


def _take(data: npt.NDArray[Any], wanted: list[range], heads: int | None) -> npt.NDArray[Any]:
    """One part of the stored array, with its rows in Hugging Face's order."""
    index = tuple(slice(part.start, part.stop) for part in wanted)
    if heads is None:
        return data[index]
    return data[_stored_rows(np.arange(len(data))[index[0]], len(data) // heads)][:, *index[1:]]


def _stored_rows(rows: npt.NDArray[np.intp], head_dim: int) -> npt.NDArray[np.intp]:
    """The stored indices of rows: llama.cpp stores row `half * (head_dim // 2) + i` of a head as row `2 * i + half`."""
    head, row = np.divmod(rows, head_dim)
    half, i = np.divmod(row, head_dim // 2)
    return head * head_dim + 2 * i + half


def _dequantise(blocks: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """[..., blocks, bytes of a block] -> [..., blocks * values of a block]."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    flat = blocks.reshape(-1, block_bytes)
    values = np.empty((len(flat), block_size), np.float32)
    step = _CHUNK // block_size
    for start in range(0, len(flat), step):
        # As one row: the package processes 16 rows at a time, which takes twice as long for a model's rows.
        chunk = flat[start : start + step]
        with np.errstate(all="ignore"):  # scales are any bits, infinities and NaN among them
            values[start : start + step] = quants.dequantize(chunk.reshape(1, -1), kind).reshape(-1, block_size)
    return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * block_size)
