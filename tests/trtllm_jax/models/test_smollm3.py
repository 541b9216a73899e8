from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import SmolLM3Config

from trtllm_jax.models.smollm3 import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> SmolLM3Config:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return SmolLM3Config(**copy.deepcopy(sizes | fields))


class TestSmolLM3(GgufModelSuite):
    configs: ClassVar = {
        "its pattern": config(num_hidden_layers=5),
        "biases, untied, its own pattern, windows": config(
            num_hidden_layers=4,
            no_rope_layers=[1, 0, 0, 1],
            use_sliding_window=True,
            sliding_window=7,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
        "every second layer, layer types": config(
            num_hidden_layers=3,
            no_rope_layer_interval=2,
            num_key_value_heads=None,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        ),
    }
    served = ("its pattern",)
    gguf: ClassVar = {"its pattern": "smollm3"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 8}
    assert Config.from_hf(bare) == Config.from_hf(SmolLM3Config(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"no_rope_layers": [1, 2]}, r"no_rope_layers=\[1, 2\]; it must be a list of num_hidden_layers=2 numbers"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 0}, r"no_rope_layer_interval=0; it must be a whole number"),
        ({"layer_types": ["sliding_attention"] * 2}, r"layer_types=.* but use_sliding_window=False"),
        ({"layer_types": 5}, r"layer_types=5; it must be a list"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
