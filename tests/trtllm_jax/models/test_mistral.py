from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import (
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
)

from trtllm_jax.models.mistral import Config

from .seeing import check_language_model, random_weights
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


def config3(*, beta: float = 0.1, **fields: Any) -> Ministral3Config:
    """Of a trained length that the prompts exceed several times."""
    rope = YARN | {"llama_4_scaling_beta": beta, "original_max_position_embeddings": 9}
    return Ministral3Config(**copy.deepcopy(SIZES | {"rope_parameters": rope} | fields))


class TestMinistral3(ModelSuite):
    configs: ClassVar = {
        "queries grow": config3(beta=0.7, head_dim=16),
        "a window, tied": config3(
            head_dim=8,
            num_key_value_heads=2,
            sliding_window=7,
            tie_word_embeddings=True,
            rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "llama_4_scaling_beta": 0.1},
        ),
        "queries do not grow": config3(beta=0.0, head_dim=8),
    }
    served = ("queries grow",)
    slow = tuple(configs)[1:]


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


@pytest.mark.parametrize("stated", [{}, {"rope_parameters": None}])
def test_fields_of_ministral_3_that_may_be_absent(stated: dict[str, Any]) -> None:
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 16, "hidden_size": 64}
    bare |= {"architectures": ["Ministral3ForCausalLM"]} | stated
    assert Config.from_hf(bare) == Config.from_hf(Ministral3Config(**bare).to_dict())
    assert Config.from_hf(bare).query_scale == (0.1, 16384, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama_4_scaling_beta": "1"}, r"llama_4_scaling_beta='1'; it must be a number of at least 0"),
        ({"original_max_position_embeddings": 1.5}, r"original_max_position_embeddings=1.5; it must be a whole"),
    ],
)
def test_scales_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    hf = config3().to_dict() | {"architectures": ["Ministral3ForCausalLM"]}
    with pytest.raises(ValueError, match=message):
        Config.from_hf(hf | {"rope_parameters": hf["rope_parameters"] | fields})


def test_a_window_that_is_null_is_none() -> None:
    assert Config.from_hf(HF | {"sliding_window": None}).windows == (None,) * 3


def test_layers_of_two_kinds_are_ministrals() -> None:
    assert Config.from_hf(MINISTRAL | TWO_KINDS | {"sliding_window": 7}).windows == (None, 7, 7)


@pytest.mark.parametrize(
    "text", [config(sliding_window=7), config3(beta=0.7, head_dim=16)], ids=["mistral", "ministral3"]
)
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "not tied"])
def test_the_language_model_of_one_that_sees_pictures(text: MistralConfig, tied: bool, tmp_path: Path) -> None:
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    whole = Mistral3Config(text_config=text.to_dict(), vision_config=vision, tie_word_embeddings=tied)
    reference = random_weights(Mistral3ForConditionalGeneration(whole))
    reference.save_pretrained(tmp_path)
    check_language_model(reference, tmp_path, "language_model.")


def seeing(text: dict[str, Any], **beside: Any) -> Config:
    """The configuration of one that sees pictures with this language model."""
    return Config.from_hf({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text, **beside})


def test_older_files_say_of_the_text_whether_embeddings_are_tied() -> None:
    assert not seeing(HF).tied
    assert seeing(HF | {"tie_word_embeddings": True}).tied
    assert not seeing(HF | {"tie_word_embeddings": True}, tie_word_embeddings=False).tied


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"text_config=None; it must be an object"),
        (HF | {"model_type": "llama"}, r"model_type='llama'; supported here: 'mistral', 'ministral3'"),
    ],
)
def test_language_models_of_another_kind_are_refused(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seeing(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"sliding_window": 0}, r"sliding_window=0; it must be a whole number from 1"),
        (TWO_KINDS, r"layer_types=\['full_attention'.*, which only Ministral has"),
        ({"layer_types": ["chunked_attention"] * 3}, r"layer_types=\['chunked_attention'"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
