from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import StableLmConfig

from trtllm_jax.models.stablelm import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> StableLmConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return StableLmConfig(**copy.deepcopy(sizes | fields))


class TestStableLm(GgufModelSuite):
    configs: ClassVar = {
        "grouped, biases": config(use_qkv_bias=True),
        "normalised heads, parallel": config(qk_layernorm=True, use_parallel_residual=True, partial_rotary_factor=0.5),
        "8 and 2 normalised heads, tied": config(
            num_attention_heads=8,
            num_key_value_heads=2,
            qk_layernorm=True,
            tie_word_embeddings=True,
            partial_rotary_factor=1.0,
            layer_norm_eps=1e-3,
        ),
    }
    served = ("normalised heads, parallel",)
    gguf: ClassVar = {"grouped, biases": "stablelm"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 32, "hidden_size": 256}
    assert Config.from_hf(bare) == Config.from_hf(StableLmConfig(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"qk_layernorm": 1}, r"qk_layernorm=1; it must be true or false"),
        ({"use_qkv_bias": "yes"}, r"use_qkv_bias='yes'; it must be true or false"),
        ({"rope_parameters": None, "partial_rotary_factor": 1.5}, r"partial_rotary_factor=1.5"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
