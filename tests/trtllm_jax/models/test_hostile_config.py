"""A config.json of nonsense: a ValueError that names the field, at once and before anything is allocated."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from trtllm_jax.models import architecture, supported
from trtllm_jax.models.llama import Config

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
COUNTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "head_dim",
)  # fmt: skip
NOT_COUNTS = (0, -1, 10**18, 10**400, 1.0, 1e308, float("nan"), float("inf"), True, "32", [32], {}, "x" * 9000)
NOT_NUMBERS = (-1, 1e308, 10**400, float("nan"), float("inf"), True, "1", [1.0], {})
NOT_FLAGS = (1, "false", [], {}, 0.0)


def read(**fields: Any) -> Config:
    tracemalloc.start()
    try:
        config = Config.from_hf(CONFIG | fields)
        assert all(type(size) is int for size in config.sizes.values())
        return config
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20


def refused(field: str, **fields: Any) -> None:
    with pytest.raises(ValueError, match=rf"\b{field}=") as caught:
        read(**fields)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_the_configuration_itself_is_read() -> None:
    assert read().sizes["head_dim"] == 8


@pytest.mark.parametrize("value", NOT_COUNTS, ids=lambda value: f"{value!r:.20}")
@pytest.mark.parametrize("field", COUNTS)
def test_what_is_no_count_is_refused(field: str, value: Any) -> None:
    refused(field, **{field: value})


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: f"{value!r:.20}")
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
def test_what_is_no_number_is_refused(field: str, value: Any) -> None:
    refused(field, **{field: value})


@pytest.mark.parametrize("value", NOT_FLAGS, ids=repr)
@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_what_is_no_flag_is_refused(field: str, value: Any) -> None:
    refused(field, **{field: value})


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16
    },
    "yarn": {
        "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0
    },
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.0,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ROPES)
def test_every_number_of_a_rope_is_checked(kind: str, spelling: str) -> None:
    rope = {"rope_type": kind, **ROPES[kind]}
    read(**{spelling: rope})
    for field in ROPES[kind]:
        for value in NOT_NUMBERS:
            refused(field, **{spelling: rope | {field: value}})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ([1], r"rope_scaling=\[1\]; it must be an object"),
        ("yarn", "rope_scaling='yarn'; it must be an object"),
        ({"rope_type": ["yarn"]}, r"rope_type \['yarn'\], which is not supported"),
        ({"rope_type": "x" * 9000}, "which is not supported"),
        ({"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 1}, "must be larger"),
        ({"rope_type": "frequency_factors"}, "factors=None; it must be a list of 4 numbers"),
        ({"rope_type": "frequency_factors", "factors": [1.0] * 5}, "it must be a list of 4 numbers"),
        ({"rope_type": "frequency_factors", "factors": [1.0, 2.0, 0.0, "4"]}, "factors=0.0; it must be a number"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 5}, "long_factor=.* list of 4"),
        ({"rope_type": "longrope", "short_factor": [0.0] * 4, "long_factor": [1.0] * 4}, "short_factor=0.0; it must"),
        (
            {"rope_type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 4, "factor": 2}
            | {"original_max_position_embeddings": 1},
            "original_max_position_embeddings=1 is too small",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 0.5}, "rope_theta=0.5 is too small"),
    ],
)
def test_a_rope_of_another_kind_is_named(rope: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(rope_scaling=rope)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"num_attention_heads": 64}, "head_dim=0"),
        ({"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "head_dim=2 is too small"),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]; supported here: 'silu'"),
        ({"hidden_act": "x" * 9000}, "supported here: 'silu'"),
    ],
)
def test_fields_that_contradict_each_other_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(**fields)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("stated", [{"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"}, "gptq"])
def test_quantised_weights_are_refused(stated: Any) -> None:
    with pytest.raises(ValueError, match=r"quantization_config=.* are read from GGUF files only"):
        architecture({"architectures": ["LlamaForCausalLM"], "quantization_config": stated})
    architecture({"architectures": ["LlamaForCausalLM"], "quantization_config": None})


def test_a_stretched_context_stays_a_number_of_the_device() -> None:
    assert read(rope_scaling={"rope_type": "linear", "factor": 1e29}).max_position == 2**31 - 1


@pytest.mark.parametrize("wanted", [{}, {"a": 1}, 7, [[1]], [{}], [None], "Perceptron", ["x" * 9000], True])
def test_architectures_of_another_kind_are_refused(wanted: Any) -> None:
    with pytest.raises(ValueError, match=r"architectures names .*supported: .*LlamaForCausalLM") as caught:
        architecture({"architectures": wanted})
    assert len(str(caught.value)) < 500 + len(", ".join(supported()))
