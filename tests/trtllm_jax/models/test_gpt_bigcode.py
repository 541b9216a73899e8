from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import GPTBigCodeConfig

from trtllm_jax.models.gpt_bigcode import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> GPTBigCodeConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "n_embd": 48, "n_inner": 90, "n_layer": 2, "n_head": 6, "n_positions": 64,
    }  # fmt: skip
    return GPTBigCodeConfig(**copy.deepcopy(sizes | fields))


class TestGPTBigCode(GgufModelSuite):
    configs: ClassVar = {
        "one key head, tied": config(),
        "a key head each, untied, not scaled": config(
            multi_query=False,
            n_inner=None,
            tie_word_embeddings=False,
            scale_attn_weights=False,
            activation_function="gelu",
            layer_norm_epsilon=1e-3,
        ),
    }
    served = ("one key head, tied",)
    gguf: ClassVar = {"one key head, tied": "starcoder"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(GPTBigCodeConfig(**bare).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "mish"}, r"activation_function='mish'; supported here: 'gelu_pytorch_tanh', "),
        ({"add_cross_attention": True}, r"add_cross_attention=True; supported here: False"),
        ({"multi_query": 1}, r"multi_query=1; it must be true or false"),
        ({"n_head": 5}, r"n_embd=48 is not a multiple of n_head=5"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
