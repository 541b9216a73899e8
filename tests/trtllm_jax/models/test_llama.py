from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from .suite import ModelSuite

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config(**fields: Any) -> LlamaConfig:
    """Two layers, with sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 90,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**sizes | fields)


class TestLlama(ModelSuite):
    configs = {
        "multi-head": config(),
        "grouped, tied": config(num_key_value_heads=2, num_attention_heads=8, tie_word_embeddings=True),
        "9 and 3 heads, head_dim": config(num_attention_heads=9, num_key_value_heads=3, hidden_size=45, head_dim=16),
        "biases": config(num_key_value_heads=3, attention_bias=True, mlp_bias=True),
        "llama3 rope": config(num_key_value_heads=1, rope_scaling=LLAMA3, rope_theta=500000.0),
        "linear rope": config(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "dynamic rope": config(rope_scaling={"rope_type": "dynamic", "factor": 3.0}, max_position_embeddings=24),
        "yarn rope": config(num_key_value_heads=2, rope_scaling=YARN, rms_norm_eps=1e-3),
    }
    served = ("grouped, tied", "dynamic rope")
