from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from checkpoints.gguf_architecture import GgufArchitecture, find_architecture
from checkpoints.gguf_config import generation_config, model_config
from checkpoints.gguf_file import GgufFile

from .gguf_llama import LLAMA

WriteGguf = Callable[..., Path]
EMBEDDING = {"token_embd.weight": np.zeros((10, 32), np.float32)}


def config_of(path: Path, architecture: GgufArchitecture = LLAMA) -> dict[str, Any]:
    return model_config(GgufFile(path), architecture)


def test_the_configuration_is_a_llama_config_json(write_gguf: WriteGguf) -> None:
    config = config_of(write_gguf(metadata={"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}))
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 64,
        "vocab_size": 4,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    read = LlamaConfig.from_dict(config)
    assert (read.head_dim, read.rope_parameters["rope_theta"], read.tie_word_embeddings) == (8, 10000.0, True)


def test_tensors_decide_about_biases_and_the_head(write_gguf: WriteGguf) -> None:
    tensors = {"output.weight": np.zeros((10, 32), np.float32), "blk.0.attn_q.bias": np.zeros(32, np.float32)}
    config = config_of(write_gguf(EMBEDDING | tensors))
    assert (config["tie_word_embeddings"], config["attention_bias"], config["vocab_size"]) == (False, True, 10)
    assert not config["mlp_bias"]
    assert config_of(write_gguf(EMBEDDING | {"blk.0.ffn_up.bias": np.zeros(64, np.float32)}))["mlp_bias"]


def test_absent_metadata_has_llama_cpps_defaults(write_gguf: WriteGguf) -> None:
    config = config_of(write_gguf(metadata={"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}))
    assert (config["num_key_value_heads"], config["rope_theta"]) == (4, 10000.0)


def test_a_stated_head_size_wins(write_gguf: WriteGguf) -> None:
    assert config_of(write_gguf(metadata={"llama.attention.key_length": 16}))["head_dim"] == 16


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0, "attn_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "attention_factor": 0.5 * (1 + 0.1 * math.log(4)),
            },
        ),
    ],
)
def test_rope_scaling(write_gguf: WriteGguf, metadata: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    keys = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    assert config_of(write_gguf(metadata=keys))["rope_scaling"] == scaling


def test_a_tensor_of_frequency_factors_is_rope_scaling(write_gguf: WriteGguf) -> None:
    tensors = EMBEDDING | {"rope_freqs.weight": np.array([1, 1.5, 4, 8], np.float32)}
    expected = {"rope_type": "frequency_factors", "factors": [1.0, 1.5, 4.0, 8.0]}
    assert config_of(write_gguf(tensors))["rope_scaling"] == expected


@pytest.mark.parametrize("rotary", [1, 49, 97, 98, None])
def test_a_part_of_each_head_is_rotated_where_the_architecture_may(write_gguf: WriteGguf, rotary: int | None) -> None:
    """The part times the channels of a head is as many channels again, whatever the division was rounded to."""
    partly = dataclasses.replace(LLAMA, partial_rotary=True)
    metadata = {"llama.attention.key_length": 98, "llama.rope.dimension_count": rotary}
    assert int(98 * config_of(write_gguf(metadata=metadata), partly)["partial_rotary_factor"]) == (rotary or 98)
    with pytest.raises(ValueError, match="rotates 99 of 98 head dimensions"):
        config_of(write_gguf(metadata=metadata | {"llama.rope.dimension_count": 99}), partly)


def test_layer_norms_have_an_epsilon_of_their_own(write_gguf: WriteGguf) -> None:
    layered = dataclasses.replace(LLAMA, metadata={"attention.layer_norm_epsilon": "norm_eps"})
    keys = {"llama.attention.layer_norm_epsilon": 1e-3, "llama.attention.layer_norm_rms_epsilon": None}
    config = config_of(write_gguf(metadata=keys), layered)
    assert (config["norm_eps"], config["rms_norm_eps"]) == (1e-3, None)


def test_every_end_of_sequence_token_is_known(write_gguf: WriteGguf) -> None:
    ids = {"bos": 0, "eos": 5, "eot": 3, "eom": 5, "padding": 7}
    path = write_gguf(metadata={f"tokenizer.ggml.{kind}_token_id": i for kind, i in ids.items()})
    assert generation_config(GgufFile(path)) == {"bos_token_id": 0, "eos_token_id": [5, 3], "pad_token_id": 7}
    assert generation_config(GgufFile(write_gguf())) == {}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, r"'llama\.block_count' is None; it must be a whole number"),
        ({"llama.block_count": "two"}, r"'llama\.block_count' is 'two'; it must be a whole number"),
        (
            {"llama.attention.head_count": [4, 4]},
            r"'llama\.attention\.head_count' is \[4, 4\]; it must be a whole number",
        ),
        ({"llama.expert_count": 8}, "has 8 experts; mixture-of-experts models are not read from GGUF"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of 8 head dimensions"),
        ({"llama.rope.scaling.type": "longrope"}, "has rope scaling 'longrope'; supported: none, linear, yarn"),
        ({"llama.rope.scaling.type": "linear"}, r"'llama\.rope\.scaling\.factor' is None"),
    ],
)
def test_what_cannot_be_configured_is_named(write_gguf: WriteGguf, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.gguf.*{message}"):
        config_of(write_gguf(metadata=metadata))


def test_scaling_and_factors_together_are_refused(write_gguf: WriteGguf) -> None:
    tensors = EMBEDDING | {"rope_freqs.weight": np.ones(4, np.float32)}
    path = write_gguf(tensors, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    with pytest.raises(ValueError, match="only one is supported"):
        config_of(path)


def test_an_architecture_states_further_fields(write_gguf: WriteGguf) -> None:
    further = {"attention.sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping"}
    other = dataclasses.replace(
        LLAMA,
        model_type="other",
        model_class="OtherForCausalLM",
        metadata=further | {"attn_logit_softcapping": "attn_logit_softcapping"},
        config={"hidden_act": "gelu_pytorch_tanh"},
    )
    path = write_gguf(metadata={"llama.attention.sliding_window": 16, "llama.final_logit_softcapping": 0.1})
    expected = {
        "model_type": "other",
        "architectures": ["OtherForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": 16,
        "final_logit_softcapping": 0.1,
    }
    assert config_of(path, other) == config_of(path) | expected


def test_an_architecture_derives_fields_from_others(write_gguf: WriteGguf) -> None:
    other = dataclasses.replace(LLAMA, derived=lambda config: {"query_pre_attn_scalar": config["head_dim"]})
    path = write_gguf()
    assert config_of(path, other) == config_of(path) | {"query_pre_attn_scalar": 8}


def test_a_further_field_that_is_no_number_is_named(write_gguf: WriteGguf) -> None:
    other = dataclasses.replace(LLAMA, metadata={"attention.sliding_window": "sliding_window"})
    path = write_gguf(metadata={"llama.attention.sliding_window": "16"})
    with pytest.raises(ValueError, match=r"'llama\.attention\.sliding_window' is '16'; it must be a number"):
        config_of(path, other)


def test_other_architectures_are_named_with_those_supported(write_gguf: WriteGguf) -> None:
    file = GgufFile(write_gguf(arch="mamba"))
    known = [dataclasses.replace(LLAMA, name="qwen2"), LLAMA]
    with pytest.raises(ValueError, match="has the architecture 'mamba'; supported in GGUF: llama, qwen2"):
        find_architecture(file, known)
    mamba = dataclasses.replace(LLAMA, name="mamba")
    assert find_architecture(file, [*known, mamba]) is mamba


def test_a_file_without_embeddings_is_no_language_model(write_gguf: WriteGguf) -> None:
    with pytest.raises(ValueError, match=r"no tensor 'token_embd\.weight'"):
        config_of(write_gguf({"v.weight": np.zeros((2, 2), np.float32)}))
