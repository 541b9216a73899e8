from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import Starcoder2Config

from trtllm_jax.models.starcoder2 import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> Starcoder2Config:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return Starcoder2Config(**copy.deepcopy(sizes | fields))


class TestStarcoder2(GgufModelSuite):
    configs: ClassVar = {
        "grouped, window": config(sliding_window=7),
        "no biases, untied": config(
            use_bias=False, tie_word_embeddings=False, num_key_value_heads=6, norm_epsilon=1e-3, hidden_act="gelu"
        ),
        "8 and 2 heads, wide window": config(num_attention_heads=8, num_key_value_heads=2, sliding_window=20),
    }
    served = ("grouped, window",)
    gguf: ClassVar = {"grouped, window": "starcoder2"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(Starcoder2Config(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, r"hidden_act='mish'; supported here: .*'relu2'"),
        ({"use_bias": "no"}, r"use_bias='no'; it must be true or false"),
        ({"norm_epsilon": -1}, r"norm_epsilon=-1; it must be a number"),
        ({"sliding_window": 0}, r"sliding_window=0; it must be a whole number"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
