from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import MinistralConfig, MistralConfig

from trtllm_jax.models.mistral import Config

from .suite import GgufModelSuite, ModelSuite

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}


# Sizes that four devices do not divide.
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64,
}  # fmt: skip


def config(**fields: Any) -> MistralConfig:
    return MistralConfig(**copy.deepcopy(SIZES | fields))


class TestMistral(GgufModelSuite):
    configs: ClassVar = {
        "a window": config(sliding_window=7, rms_norm_eps=1e-3),
        "head_dim, tied, yarn": config(
            sliding_window=None, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_parameters=YARN
        ),
    }
    served = ("a window",)
    gguf: ClassVar = {"head_dim, tied, yarn": "llama"}
    slow = ("head_dim, tied, yarn",)


class TestMinistral(ModelSuite):
    configs: ClassVar = {
        "two kinds of layers": MinistralConfig(
            **SIZES,
            head_dim=16,
            sliding_window=7,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
        "a window": MinistralConfig(**SIZES, head_dim=8, sliding_window=9),
    }
    served = ("two kinds of layers",)
    slow = ("two kinds of layers", "a window")


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


MINISTRAL = HF | {"architectures": ["MinistralForCausalLM"]}
TWO_KINDS = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}


def test_fields_that_may_be_absent() -> None:
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 16, "hidden_size": 64}
    assert Config.from_hf(bare) == Config.from_hf(MistralConfig(**bare).to_dict())
    assert Config.from_hf(bare).windows == (4096,) * 3
    ministral = bare | {"architectures": ["MinistralForCausalLM"]}
    assert Config.from_hf(ministral) == Config.from_hf(MinistralConfig(**ministral).to_dict())


def test_a_window_that_is_null_is_none() -> None:
    assert Config.from_hf(HF | {"sliding_window": None}).windows == (None,) * 3


def test_layers_of_two_kinds_are_ministrals() -> None:
    assert Config.from_hf(MINISTRAL | TWO_KINDS | {"sliding_window": 7}).windows == (None, 7, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"sliding_window": 0}, r"sliding_window=0; it must be a whole number from 1"),
        (TWO_KINDS, r"layer_types=\['full_attention'.*, which only MinistralForCausalLM has"),
        ({"layer_types": ["chunked_attention"] * 3}, r"layer_types=\['chunked_attention'"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
