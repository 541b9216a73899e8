"""A saved model of transformers as a GGUF file: names by the gguf package, the remainder as llama.cpp converts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map, quants
from safetensors.numpy import load_file


def write_gguf(folder: Path, path: Path, name: str) -> Path:
    """Writes the model that `folder` holds as the GGUF architecture `name`, in float32."""
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, name)
    _add_sizes(writer, config)
    _add_rope(writer, config["rope_parameters"])
    (arch,) = (arch for arch, its_name in MODEL_ARCH_NAMES.items() if its_name == name)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    for tensor, values in load_file(folder / "model.safetensors").items():
        module, _, kind = tensor.rpartition(".")
        stored = _converted(name, module.rpartition(".")[2], values, config)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", quants.quantize(stored, GGMLQuantizationType.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(name: str, module: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """What llama.cpp stores: Gemma's norms plus one, the halves of Llama's query and key heads interleaved."""
    if name.startswith("gemma") and module.endswith("norm"):
        return values + np.float32(1)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(module)
    if name != "llama" or heads is None:
        return values
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _add_sizes(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config.get("sliding_window") is not None:
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping") is not None:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping") is not None:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _add_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    """That of the layers which see everything, where others have one of their own: llama.cpp knows theirs."""
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
