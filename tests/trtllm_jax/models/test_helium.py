from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import HeliumConfig

from trtllm_jax.models.helium import Config

from .suite import ModelSuite

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}


def config(**fields: Any) -> HeliumConfig:
    """Two layers, with sizes that four devices do not divide; all heads together have the hidden size's channels."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 60, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 10, "max_position_embeddings": 64,
    }  # fmt: skip
    return HeliumConfig(**copy.deepcopy(sizes | fields))


class TestHelium(ModelSuite):
    configs: ClassVar = {
        "6 and 3 heads": config(),
        "multi-head, tied, biases of attention": config(
            num_key_value_heads=6, tie_word_embeddings=True, attention_bias=True, rms_norm_eps=1e-3
        ),
        "one key head, biases of both, yarn": config(
            num_key_value_heads=1, attention_bias=True, mlp_bias=True, rope_parameters=YARN
        ),
    }
    served = ("6 and 3 heads",)
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 40}
    assert Config.from_hf(bare) == Config.from_hf(HeliumConfig(**bare).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"attention_bias": 1}, r"attention_bias=1; it must be true or false"),
        ({"mlp_bias": "no"}, r"mlp_bias='no'; it must be true or false"),
        ({"head_dim": 15}, r"head_dim=15 is odd"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
