from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import ApertusConfig

from trtllm_jax.models.apertus import Config

from .suite import ModelSuite


def config(**fields: Any) -> ApertusConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return ApertusConfig(**copy.deepcopy(sizes | fields))


class TestApertus(ModelSuite):
    configs: ClassVar = {
        "grouped": config(),
        "biases, tied, head_dim, plain rope": config(
            num_key_value_heads=1,
            head_dim=16,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            rms_norm_eps=1e-3,
        ),
    }
    served = ("grouped",)
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(ApertusConfig(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "silu"}, r"hidden_act='silu'; supported here: 'xielu'"),
        ({"attention_bias": 1}, r"attention_bias=1; it must be true or false"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
