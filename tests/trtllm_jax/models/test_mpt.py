from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import MptConfig

from trtllm_jax.models.mpt import Config

from .suite import ModelSuite


def config(**fields: Any) -> MptConfig:
    """Sizes that four devices do not divide."""
    attention = fields.pop("attn_config", {})
    sizes: dict[str, Any] = {"vocab_size": 101, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64}
    return MptConfig(**copy.deepcopy(sizes | fields), attn_config=attention)


class TestMpt(ModelSuite):
    configs: ClassVar = {
        "6 heads, clipped": config(attn_config={"clip_qkv": 1.5}),
        "8 heads, its own scale": config(n_heads=8, attn_config={"softmax_scale": 0.2}),
        "untied": config(tie_word_embeddings=False),
    }
    served = ("6 heads, clipped",)
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()


def test_fields_that_may_be_absent() -> None:
    assert Config.from_hf({}) == Config.from_hf(MptConfig().to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_bias": False}, "no_bias=False"),
        ({"expansion_ratio": 3}, "expansion_ratio=3"),
        ({"attn_config": {"alibi": False}}, "alibi=False"),
        ({"attn_config": {"qk_ln": True}}, "qk_ln=True"),
        ({"attn_config": {"alibi_bias_max": 4}}, "alibi_bias_max=4"),
        ({"attn_config": [1]}, r"attn_config=\[1\]; it must be an object"),
        ({"attn_config": {"softmax_scale": -1}}, "softmax_scale=-1"),
        ({"d_model": 50}, r"hidden_size=50 is not a multiple of num_attention_heads=6"),
        ({"d_model": "48"}, "hidden_size='48'"),
        ({"logit_scale": 2.0}, "logit_scale=2.0"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
