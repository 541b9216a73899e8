"""A GGUF file's metadata as a Hugging Face configuration."""

import math
from typing import Any

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_metadata import ArchitectureMetadata
from checkpoints.gguf_rope import rope_scaling

RMS_EPS, LAYER_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
"""What norms add to the mean square, and layer norms to the variance: an architecture has one of them."""


def model_config(file: GgufFile, architecture: GgufArchitecture) -> dict[str, Any]:
    """The model's configuration in the form of a Hugging Face config.json."""
    metadata = ArchitectureMetadata(file)
    if experts := metadata.count("expert_count", default=0, minimum=0):
        raise ValueError(f"{file.path} has {experts} experts; mixture-of-experts models are not read from GGUF")
    hidden, heads = metadata.count("embedding_length"), metadata.count("attention.head_count")
    head_dim = metadata.count("attention.key_length", default=hidden // heads)
    rotary = metadata.count("rope.dimension_count", default=head_dim)
    if rotary != head_dim and not (architecture.partial_rotary and 0 < rotary < head_dim):
        raise ValueError(f"{file.path} rotates {rotary} of {head_dim} head dimensions; only whole heads are supported")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight': it is not a language model's file")
    config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": None if LAYER_EPS in architecture.metadata else metadata.number(RMS_EPS),
        "rope_theta": metadata.number("rope.freq_base", default=10000.0),
        "rope_scaling": rope_scaling(file, metadata, head_dim),
        "max_position_embeddings": metadata.count("context_length"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "bos_token_id": file.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.integer("tokenizer.ggml.eos_token_id"),
        **architecture.config,
        **_further_fields(metadata, architecture),
    }
    if architecture.partial_rotary:
        # Rounded up, so that this times head_dim is not a fraction below the number of channels.
        config["partial_rotary_factor"] = math.nextafter(rotary / head_dim, 1.0)
    return {**config, **architecture.derived(config)}


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The file's token ids in the form of a generation_config.json: `eos_token_id` lists all that end a sequence."""

    def token_id(kind: str) -> int | None:
        return file.integer(f"tokenizer.ggml.{kind}_token_id")

    ends = dict.fromkeys(token_id(kind) for kind in ("eos", "eot", "eom") if token_id(kind) is not None)
    config = {"bos_token_id": token_id("bos"), "eos_token_id": list(ends) or None, "pad_token_id": token_id("padding")}
    return {key: value for key, value in config.items() if value is not None}


def _further_fields(metadata: ArchitectureMetadata, architecture: GgufArchitecture) -> dict[str, int | float]:
    return {
        field: metadata.count_or_number(key)
        for key, field in architecture.metadata.items()
        if metadata.get(key) is not None
    }
