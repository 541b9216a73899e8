from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import GraniteConfig

from trtllm_jax.models.granite import Config

from .suite import GgufModelSuite

FACTORS: dict[str, float] = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 8.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config(**fields: Any) -> GraniteConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64,
    }  # fmt: skip
    return GraniteConfig(**copy.deepcopy(sizes | FACTORS | fields))


class TestGranite(GgufModelSuite):
    configs: ClassVar = {
        "grouped, tied": config(tie_word_embeddings=True),
        "one key head, biases, yarn": config(
            num_key_value_heads=1, attention_bias=True, mlp_bias=True, rope_scaling=YARN, rms_norm_eps=1e-3
        ),
        "no factors": config(**dict.fromkeys(FACTORS, 1.0), num_key_value_heads=6),
    }
    served = ("grouped, tied",)
    gguf: ClassVar = {"one key head, biases, yarn": "granite"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(GraniteConfig(**bare).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"residual_multiplier": "0.2"}, r"residual_multiplier='0.2'; it must be a number"),
        ({"embedding_multiplier": float("nan")}, r"embedding_multiplier=nan; it must be a number"),
        ({"attention_multiplier": -1}, r"attention_multiplier=-1; it must be a number of at least 0"),
        ({"logits_scaling": 0}, r"logits_scaling=0; logits are divided by it"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
