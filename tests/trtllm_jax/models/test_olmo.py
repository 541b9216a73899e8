from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import OlmoConfig

from trtllm_jax.models.olmo import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> OlmoConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return OlmoConfig(**copy.deepcopy(sizes | fields))


class TestOlmo(GgufModelSuite):
    configs: ClassVar = {
        "grouped, clipped": config(clip_qkv=1.5),
        "multi-head, biases, tied": config(num_key_value_heads=None, attention_bias=True, tie_word_embeddings=True),
    }
    served = ("grouped, clipped",)
    gguf: ClassVar = {"grouped, clipped": "olmo"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(OlmoConfig(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"clip_qkv": "8"}, r"clip_qkv='8'; it must be a number"),
        ({"layer_norm_eps": 1e-6}, r"layer_norm_eps=1e-06; supported here: 1e-05"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
