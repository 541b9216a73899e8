from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import Qwen3Config

from trtllm_jax.models.qwen3 import Config

from .suite import GgufModelSuite

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}


def config(**fields: Any) -> Qwen3Config:
    """Three layers, with sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    return Qwen3Config(**copy.deepcopy(sizes | fields))


class TestQwen3(GgufModelSuite):
    configs: ClassVar = {
        "windows after the first layer": config(
            use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True
        ),
        "biases, yarn": config(
            num_attention_heads=10, num_key_value_heads=2, head_dim=8, attention_bias=True, rope_parameters=YARN
        ),
        "tied": config(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-3),
    }
    served = ("windows after the first layer",)
    gguf: ClassVar = {"tied": "qwen3"}
    slow = ("biases, yarn", "tied")


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 32, "hidden_size": 64}
    assert Config.from_hf(bare) == Config.from_hf(Qwen3Config(**bare).to_dict())
    windows = bare | {"use_sliding_window": True, "num_hidden_layers": 30}
    assert Config.from_hf(windows) == Config.from_hf(Qwen3Config(**windows).to_dict())
    assert Config.from_hf(windows).windows == (None,) * 28 + (4096,) * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"attention_bias": 1}, r"attention_bias=1; it must be true or false"),
        ({"use_sliding_window": "yes"}, r"use_sliding_window='yes'; it must be true or false"),
        ({"use_sliding_window": True, "sliding_window": 0, "layer_types": None, "max_window_layers": 0},
         r"sliding_window=0; it must be a whole number from 1"),
        ({"use_sliding_window": True, "layer_types": None, "max_window_layers": -1},
         r"max_window_layers=-1; it must be a whole number from 0"),
        ({"layer_types": ["sliding_attention"] * 3},
         r"layer_types with 'sliding_attention', but use_sliding_window=False"),
        ({"layer_types": ["chunked_attention"] * 3}, r"layer_types=\['chunked_attention'"),
    ],
)  # fmt: skip
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
