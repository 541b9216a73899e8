from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import SeedOssConfig

from trtllm_jax.models.seed_oss import Config

from .suite import GgufModelSuite


def config(**fields: Any) -> SeedOssConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return SeedOssConfig(**copy.deepcopy(sizes | fields))


class TestSeedOss(GgufModelSuite):
    configs: ClassVar = {
        "grouped, head_dim": config(head_dim=16),
        "no biases, tied": config(head_dim=None, attention_bias=False, tie_word_embeddings=True, num_key_value_heads=6),
        "biases everywhere": config(head_dim=8, attention_out_bias=True, mlp_bias=True),
    }
    served = ("grouped, head_dim",)
    gguf: ClassVar = {"grouped, head_dim": "seed_oss"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 8}
    assert Config.from_hf(bare) == Config.from_hf(SeedOssConfig(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"pretraining_tp": 2}, r"pretraining_tp=2; supported here: 1"),
        ({"attention_out_bias": 1}, r"attention_out_bias=1; it must be true or false"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
