from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import InternLM3Config, LlamaConfig

from trtllm_jax.models.llama import Config, table

from .suite import ModelSuite

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Two layers, with sizes that four devices do not divide.
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 64,
}  # fmt: skip


def config(**fields: Any) -> LlamaConfig:
    return LlamaConfig(
        **copy.deepcopy(SIZES | {"num_key_value_heads": 6} | fields)
    )  # transformers completes a rope record in place


class TestLlama(ModelSuite):
    configs: ClassVar = {
        "multi-head": config(),
        "9 and 3 heads, tied, dynamic": config(
            hidden_size=72,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            rope_scaling=DYNAMIC,
            max_position_embeddings=24,
        ),
        "head_dim, yarn": config(num_key_value_heads=2, head_dim=16, rope_scaling=YARN, rms_norm_eps=1e-3),
        "biases, linear": config(num_key_value_heads=3, attention_bias=True, mlp_bias=True, rope_scaling=LINEAR),
        "8 and 2 heads, biases": config(num_attention_heads=8, num_key_value_heads=2, head_dim=8, attention_bias=True),
        "one key head, llama3": config(num_key_value_heads=1, rope_scaling=LLAMA3, rope_theta=500000.0),
    }
    served = ("9 and 3 heads, tied, dynamic",)


class TestInternLM3(ModelSuite):
    """As transformers saves it, which is as Llama."""

    configs: ClassVar = {
        "biases, dynamic": InternLM3Config(
            **SIZES, num_key_value_heads=2, head_dim=16, qkv_bias=True, bias=True, rope_parameters=dict(DYNAMIC)
        ),
    }
    served = tuple(configs)
    slow = tuple(configs)


HF: dict[str, Any] = config(num_key_value_heads=3).to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def without(field: str) -> dict[str, Any]:
    return {key: value for key, value in HF.items() if key != field}


def test_fields_that_may_be_absent() -> None:
    """Old Llama files state none of them; transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(LlamaConfig(**bare).to_dict())


@pytest.mark.parametrize("bias", [False, True])
def test_internlm3_as_it_is_published_is_what_transformers_reads(bias: bool) -> None:
    published = {name: HF[name] for name in REQUIRED} | {
        "architectures": ["InternLM3ForCausalLM"], "qkv_bias": bias, "bias": bias,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}, "rope_theta": 5e7,
    }  # fmt: skip
    as_llama = InternLM3Config(**published).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    assert Config.from_hf(published) == Config.from_hf(as_llama)


def test_internlm3_states_two_kinds_of_biases() -> None:
    hf = HF | {"architectures": ["InternLM3ForCausalLM"]}
    of_inputs, others = ({row.path for row in table(Config.from_hf(hf | {one: True}))} for one in ("qkv_bias", "bias"))
    assert {path for path in of_inputs if path.endswith("_bias")} == {"layers.{i}.qkv_bias"}
    assert others - of_inputs == {"layers.{i}.o_bias", "layers.{i}.gate_up_bias", "layers.{i}.down_bias"}


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_fields_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=rf"lacks {field}"):
        Config.from_hf(without(field))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"num_key_value_heads": 4}, r"num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads=0; it must be a whole number from 1"),
        ({"hidden_size": 48.0}, r"hidden_size=48.0; it must be a whole number"),
        ({"num_hidden_layers": True}, r"num_hidden_layers=True; it must be a whole number"),
        ({"vocab_size": "101"}, r"vocab_size='101'; it must be a whole number"),
        ({"max_position_embeddings": -1}, r"max_position_embeddings=-1; it must be a whole number"),
        ({"rope_parameters": {"rope_type": "spiral"}}, r"rope_type 'spiral', which is not supported"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)


def test_longest_sequence_counts_what_rope_stretches() -> None:
    assert Config.from_hf(HF).max_position == 64
    assert Config.from_hf(HF | {"rope_scaling": DYNAMIC}).max_position == 192
    assert Config.from_hf(HF | {"rope_scaling": YARN}).max_position == 64
