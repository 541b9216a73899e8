"""A memory-mapped GGUF file: its metadata, and the bytes of its tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES

from checkpoints.error_text import short_repr
from checkpoints.gguf_header import GgufHeader, GgufTensor
from checkpoints.regular_file import map_regular


class GgufFile:
    """An open GGUF file. ValueError, naming the file, where it is not one, is damaged, or is one part of several.

    With links resolved the file must be in `folder` or in the hub's cache. Without a `folder` the user named the file
    itself, which may be anywhere.
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self.path = path
        # A plain array over the mapping: slices of numpy's memmap class cost several times more.
        self._mapped: npt.NDArray[np.uint8] = np.frombuffer(map_regular(path, folder), np.uint8)
        header = GgufHeader(path, self._mapped.data)
        self.metadata: Mapping[str, Any] = header.metadata
        self.tensors: Mapping[str, GgufTensor] = header.tensors
        parts = self.integer("split.count")
        if parts is not None and parts > 1:
            raise ValueError(f"{path} is one of {parts} parts of a model; merge them into one file (llama-gguf-split)")

    def integer(self, key: str) -> int | None:
        """The metadata's integer at `key`, None where it states none; ValueError where it is something else."""
        value = self.metadata.get(key)
        if value is not None and type(value) is not int:
            raise ValueError(f"{self.path}: {key!r} is {short_repr(value)}; it must be an integer")
        return value

    def data(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, a read-only view [..., blocks of the innermost dimension, bytes of a block]."""
        block_size, block_bytes = GGML_QUANT_SIZES[tensor.type]
        flat = self._mapped[tensor.offset : tensor.offset + tensor.nbytes]
        return flat.reshape(*tensor.shape[:-1], tensor.shape[-1] // block_size, block_bytes)
