from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import GemmaConfig

from trtllm_jax.models.gemma import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> GemmaConfig:
    """Two layers, with sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    return GemmaConfig(**copy.deepcopy(sizes | fields))


class TestGemma(GgufModelSuite):
    configs: ClassVar = {
        "6 and 3 heads": config(rms_norm_eps=1e-3),
        "one key head, biases, not tied, linear": config(
            num_key_value_heads=1,
            attention_bias=True,
            tie_word_embeddings=False,
            hidden_act="gelu",
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
        ),
    }
    served = ("6 and 3 heads",)
    gguf: ClassVar = {"6 and 3 heads": "gemma"}
    slow = ("one key head, biases, not tied, linear",)


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 32, "hidden_size": 64}
    assert Config.from_hf(bare) == Config.from_hf(GemmaConfig(**bare).to_dict())
    assert Config.from_hf(bare).tied


def test_the_first_files_say_gelu() -> None:
    assert Config.from_hf(HF | {"hidden_act": "gelu"}) == Config.from_hf(HF)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "silu"}, r"hidden_act='silu'; supported here: 'gelu_pytorch_tanh', 'gelu'"),
        ({"hidden_activation": "relu"}, r"hidden_activation='relu'; supported here: None, 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, r"use_bidirectional_attention=True; supported here: None, False"),
        ({"attention_bias": "no"}, r"attention_bias='no'; it must be true or false"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
