"""The configurations that the GPU benchmarks measure, by name, and the least time of a decode step of each."""

from typing import Any

BFLOAT16 = 2

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama-3.2-3b": _LLAMA | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64, "tie_word_embeddings": True,
    },
    "mistral-7b": _LLAMA | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "sliding_window": None,
    },
    "qwen3-4b": _LLAMA | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560,
        "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    },
    "qwen3-8b": _LLAMA | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    },
    "qwen3-14b": _LLAMA | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120,
        "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    },
    "gemma-3-12b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "dtype": "bfloat16", "vocab_size": 262144,
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 256, "sliding_window": 1024, "sliding_window_pattern": 6,
        "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip

SHAPES["gemma-3-12b-full"] = SHAPES["gemma-3-12b"] | {"sliding_window": 131072}
"""The same with windows that hold every token: what the windows of a long context save."""

LLAMA_8B = SHAPES["llama-3.1-8b"]


def weights_read(config: dict[str, Any]) -> int:
    """Weights that a decode step multiplies by: all but the rows of the embedding that no head shares."""
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    attention = (2 * heads + 2 * kv) * config["head_dim"] * hidden
    layer = attention + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * layer + config["vocab_size"] * hidden


def cache_read(config: dict[str, Any], context: int) -> int:
    """Numbers of the KV cache that a row reads at a context, windows considered."""
    pattern, window = config.get("sliding_window_pattern", 1), config.get("sliding_window") or context
    layers = config["num_hidden_layers"]
    full = layers // pattern
    tokens = full * context + (layers - full) * min(context, window)
    return 2 * config["num_key_value_heads"] * config["head_dim"] * tokens


def decode_floor_ms(config: dict[str, Any], rows: int, context: int, read_tb_s: float, peak_tflop_s: float) -> float:
    """The least time of a step: its bytes in bfloat16 by the bandwidth, or its products by the peak if that is more."""
    bytes_ms = (weights_read(config) + rows * cache_read(config, context)) * BFLOAT16 / read_tb_s / 1e9
    return max(bytes_ms, 2 * rows * weights_read(config) / peak_tflop_s / 1e9)
