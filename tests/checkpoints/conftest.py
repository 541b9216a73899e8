"""Small GGUF files, written by the gguf package itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

# A Llama of 2 layers with 4 query and 2 key heads of 8.
LLAMA: Mapping[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}

WriteGguf = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """write_gguf(tensors, metadata, types={name: GGML type}, arch="llama") -> the file's path."""

    def write(
        tensors: Mapping[str, npt.NDArray[Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        types: Mapping[str, GGMLQuantizationType] | None = None,
        arch: str = "llama",
        name: str = "model.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = GGUFWriter(path, arch)
        for key, value in (LLAMA | dict(metadata or {})).items():
            _add(writer, key, value)
        if tensors is None:
            tensors = {"token_embd.weight": np.zeros((4, 32), np.float32)}
        for tensor_name, values in tensors.items():
            kind = (types or {}).get(tensor_name, GGMLQuantizationType.F32)
            # Blocks that the package cannot make are given as bytes.
            stored = values if values.dtype == np.uint8 else quants.quantize(values, kind)
            writer.add_tensor(tensor_name, stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Write a metadata value by its Python type; integers and floats have 32 bits, as in real files."""
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
