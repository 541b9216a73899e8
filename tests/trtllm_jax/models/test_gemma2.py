from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import Gemma2Config

from trtllm_jax.models.gemma2 import GGUF, Config

from .suite import GgufModelSuite


def config(**fields: Any) -> Gemma2Config:
    """Three layers, with sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 64, "query_pre_attn_scalar": 10,
        "sliding_window": 7, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
    }  # fmt: skip
    return Gemma2Config(**copy.deepcopy(sizes | fields))


class TestGemma2(GgufModelSuite):
    configs: ClassVar = {
        "6 and 3 heads": config(),
        "biases, not tied, no caps": config(
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=False,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            layer_types=["full_attention", "full_attention", "sliding_attention"],
        ),
        "llama.cpp's query scale, linear": config(
            query_pre_attn_scalar=16, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
        ),
    }
    served = ("6 and 3 heads",)
    gguf: ClassVar = {"llama.cpp's query scale, linear": "gemma2"}
    slow = ("biases, not tied, no caps", "llama.cpp's query scale, linear")


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 8}
    read = Config.from_hf(bare)
    assert read == Config.from_hf(Gemma2Config(**bare).to_dict())
    assert (read.windows, read.query_scale, read.score_cap, read.logit_cap) == ((4096, None, 4096), 1 / 16, 50.0, 30.0)


@pytest.mark.parametrize(("layers", "scalar"), [(26, 128), (46, 144)])
def test_gguf_files_of_27b_scale_queries_by_the_stream(layers: int, scalar: int) -> None:
    sizes = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128, "num_hidden_layers": layers}
    assert GGUF[0].derived(sizes) == {"query_pre_attn_scalar": scalar}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, r"hidden_activation='gelu'; supported here: 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, r"use_bidirectional_attention=True; supported here: None, False"),
        ({"sliding_window": 0}, r"sliding_window=0; it must be a whole number from 1"),
        ({"sliding_window": None}, r"config.json lacks sliding_window"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types=\['sliding_attention'\]; it must be a list of num_h"),
        ({"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar=0; it must be a whole number from 1"),
        ({"attn_logit_softcapping": 0.0}, r"attn_logit_softcapping=0.0; it must be a number above 0"),
        ({"final_logit_softcapping": "5"}, r"final_logit_softcapping='5'; it must be a number above 0"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
