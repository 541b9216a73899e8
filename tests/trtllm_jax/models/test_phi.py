from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import PhiConfig

from trtllm_jax.models.phi import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> PhiConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return PhiConfig(**copy.deepcopy(sizes | fields))


class TestPhi(GgufModelSuite):
    configs: ClassVar = {
        "a half of each head": config(),
        "6 and 3 heads, normalised, tied, linear": config(
            num_key_value_heads=3,
            qk_layernorm=True,
            tie_word_embeddings=True,
            hidden_act="gelu",
            layer_norm_eps=1e-3,
            rope_parameters={
                "rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.25
            },
        ),
    }  # fmt: skip
    served = ("a half of each head",)
    gguf: ClassVar = {"a half of each head": "phi2"}
    slow = ("6 and 3 heads, normalised, tied, linear",)


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    bare = {name: HF[name] for name in REQUIRED}
    read = Config.from_hf(bare)
    assert read == Config.from_hf(PhiConfig(**bare).to_dict())
    assert len(read.rope.frequencies) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, r"hidden_act='mish'; supported here: 'gelu_new'"),
        ({"qk_layernorm": 1}, r"qk_layernorm=1; it must be true or false"),
        ({"layer_norm_eps": "1"}, r"layer_norm_eps='1'; it must be a number of at least 0"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, r"partial_rotary_factor=1.5, which rotates 12 of 8"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
