"""A saved model of transformers as a GGUF file: names by the gguf package, the remainder as llama.cpp converts it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map, quants
from safetensors.numpy import load_file

INTERLEAVED = ("llama", "granite", "arcee", "olmo", "smollm3")
"""Architectures whose query and key heads have their halves interleaved."""

PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
"""Architectures whose norms are stored plus one."""

OF_GPT2 = {
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
    "layer_norm_eps": "layer_norm_epsilon",
}
"""What configurations in the style of GPT-2 call the fields on the left."""

WRITE: Mapping[str, Callable[[GGUFWriter, Any], None]] = {
    "num_hidden_layers": GGUFWriter.add_block_count,
    "max_position_embeddings": GGUFWriter.add_context_length,
    "hidden_size": GGUFWriter.add_embedding_length,
    "intermediate_size": GGUFWriter.add_feed_forward_length,
    "num_attention_heads": GGUFWriter.add_head_count,
    "num_key_value_heads": GGUFWriter.add_head_count_kv,
    "head_dim": GGUFWriter.add_key_length,
    "rms_norm_eps": GGUFWriter.add_layer_norm_rms_eps,
    "layer_norm_eps": GGUFWriter.add_layer_norm_eps,
    "norm_eps": GGUFWriter.add_layer_norm_eps,
    "norm_epsilon": GGUFWriter.add_layer_norm_eps,
    "sliding_window": GGUFWriter.add_sliding_window,
    "attn_logit_softcapping": GGUFWriter.add_attn_logit_softcapping,
    "final_logit_softcapping": GGUFWriter.add_final_logit_softcapping,
    "clip_qkv": GGUFWriter.add_clamp_kqv,
    "embedding_multiplier": GGUFWriter.add_embedding_scale,
    "attention_multiplier": GGUFWriter.add_attention_scale,
    "residual_multiplier": GGUFWriter.add_residual_scale,
    "logits_scaling": GGUFWriter.add_logit_scale,
    "logit_scale": GGUFWriter.add_logit_scale,
}
"""What states a field of the configuration, where it has a value."""


def write_gguf(folder: Path, path: Path, name: str) -> Path:
    """Writes the model that `folder` holds as the GGUF architecture `name`, in float32."""
    config = json.loads((folder / "config.json").read_text())
    if name in ("gpt2", "starcoder"):
        config |= {ours: config[theirs] for ours, theirs in OF_GPT2.items()}
    writer = GGUFWriter(path, name)
    for field, write in WRITE.items():
        if config.get(field) is not None:
            write(writer, config[field])
    if name == "olmo":
        writer.add_layer_norm_eps(1e-5)
    if "rope_parameters" in config:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        _add_rope(writer, name, config["rope_parameters"], head_dim)
    (arch,) = (arch for arch, its_name in MODEL_ARCH_NAMES.items() if its_name == name)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    for tensor, values in load_file(folder / "model.safetensors").items():
        module, _, kind = tensor.rpartition(".")
        stored = _converted(name, tensor, values, config)
        writer.add_tensor(f"{names.get_name(module)}.{kind}", quants.quantize(stored, GGMLQuantizationType.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(name: str, tensor: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """What llama.cpp stores: some norms plus one, some matrices transposed, some heads' halves interleaved."""
    if name in PLUS_ONE and tensor.endswith("norm.weight"):
        return values + np.float32(1)
    module = tensor.split(".")[-2]
    if name == "gpt2" and module.startswith("c_") and values.ndim == 2:
        return values.T
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}.get(module)
    if name not in INTERLEAVED or heads is None:
        return values
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _add_rope(writer: GGUFWriter, name: str, rope: dict[str, Any], head_dim: int) -> None:
    """That of the layers which see everything, where others have one of their own: llama.cpp knows theirs."""
    rope = rope.get("full_attention", rope)
    if "alpha" in rope:  # of Hunyuan's
        writer.add_rope_freq_base(rope["rope_theta"] * rope["alpha"] ** (head_dim / (head_dim - 2)))
        writer.add_rope_scaling_type(RopeScalingType.NONE)
        return
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("partial_rotary_factor") is not None:
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    elif name == "nemotron":
        writer.add_rope_scaling_type(RopeScalingType.NONE)
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
