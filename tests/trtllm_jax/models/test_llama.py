from __future__ import annotations

from typing import Any, ClassVar

from transformers import LlamaConfig

from .suite import ModelSuite

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
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
    configs: ClassVar = {
        "multi-head": config(),
        "9 and 3 heads, tied": config(
            hidden_size=72, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
        ),
        "head_dim, yarn": config(num_key_value_heads=2, head_dim=16, rope_scaling=YARN, rms_norm_eps=1e-3),
        "biases, linear": config(num_key_value_heads=3, attention_bias=True, mlp_bias=True, rope_scaling=LINEAR),
        "one key head, llama3": config(num_key_value_heads=1, rope_scaling=LLAMA3, rope_theta=500000.0),
        "dynamic": config(num_key_value_heads=3, rope_scaling=DYNAMIC, max_position_embeddings=24),
    }
    served = ("9 and 3 heads, tied", "dynamic")
