"""Tiny models as GGUF files, whose tensors have the names that the gguf package itself gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from safetensors.numpy import load_file

from trtllm_jax.functional.research import load_model

from .tiny import TinyModel

LENGTHS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def write_gguf(
    tiny: TinyModel,
    path: Path,
    name: str,
    metadata: Mapping[str, float] | None = None,
    permuted: Mapping[str, int] | None = None,
) -> None:
    """The checkpoint of `tiny` as llama.cpp's converter writes the architecture `name`, with `metadata` of its own.

    The rows of the modules in `permuted` are stored as llama.cpp turns them, which needs their numbers of heads.
    """
    config, layers = tiny.hf_config, tiny.hf_config.num_hidden_layers
    architecture = next(known for known in MODEL_ARCH if MODEL_ARCH_NAMES[known] == name)
    names = get_tensor_name_map(architecture, layers)
    writer = GGUFWriter(path, name)
    writer.add_block_count(layers)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    stated = {key: getattr(config, field) for key, field in LENGTHS.items()} | dict(metadata or {})
    for key, value in stated.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{name}.{key}", value)
    for hf_name, values in load_file(tiny.folder / "model.safetensors").items():
        stored = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, hf_name
        heads = next((count for module, count in (permuted or {}).items() if f".{module}." in hf_name), None)
        if heads is not None:
            halves = values.reshape(heads, 2, -1, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(stored, quants.quantize(values, GGMLQuantizationType.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_logits(path: Path, prompt: list[int]) -> np.ndarray:
    """Logits [length, vocab] of a prompt by the model that the file holds."""
    model, params = load_model(path, dtype="float32")
    return np.asarray(jax.jit(model)(params, np.array([prompt]))[0])
