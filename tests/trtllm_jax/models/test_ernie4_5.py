from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import Ernie4_5Config

from trtllm_jax.models.ernie4_5 import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> Ernie4_5Config:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return Ernie4_5Config(**copy.deepcopy(sizes | fields))


class TestErnie45(GgufModelSuite):
    configs: ClassVar = {
        "grouped, tied": config(),
        "biases, untied, one key head": config(
            use_bias=True, tie_word_embeddings=False, num_key_value_heads=1, head_dim=None, rms_norm_eps=1e-3
        ),
    }
    served = ("grouped, tied",)
    gguf: ClassVar = {"grouped, tied": "ernie4_5", "biases, untied, one key head": "ernie4_5"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(Ernie4_5Config(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"use_bias": "no"}, r"use_bias='no'; it must be true or false"),
        ({"head_dim": 15}, r"head_dim=15 is odd"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
