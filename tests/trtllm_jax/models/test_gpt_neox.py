from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import GPTNeoXConfig

from trtllm_jax.models.gpt_neox import Config

from .suite import ModelSuite


def config(**fields: Any) -> GPTNeoXConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return GPTNeoXConfig(**copy.deepcopy(sizes | fields))


class TestGPTNeoX(ModelSuite):
    configs: ClassVar = {
        "parallel": config(),
        "one block after the other, tied, no biases": config(
            use_parallel_residual=False, tie_word_embeddings=True, attention_bias=False, hidden_act="gelu_fast"
        ),
        "all of a head is rotated": config(rotary_pct=1.0, rotary_emb_base=500, layer_norm_eps=1e-3),
    }
    served = ("parallel",)
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(GPTNeoXConfig(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, r"hidden_act='mish'; supported here: .*'relu2'"),
        ({"hidden_size": 50}, r"hidden_size=50 is not a multiple of num_attention_heads=6"),
        ({"use_parallel_residual": 1}, r"use_parallel_residual=1; it must be true or false"),
        ({"layer_norm_eps": True}, r"layer_norm_eps=True; it must be a number"),
        ({"rope_parameters": None, "rotary_pct": 2}, r"partial_rotary_factor=2"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)


def test_older_files_have_other_names() -> None:
    older = {name: value for name, value in HF.items() if name != "rope_parameters"}
    read = Config.from_hf(older | {"rotary_pct": 0.5, "rotary_emb_base": 777})
    assert read == Config.from_hf(config(rotary_pct=0.5, rotary_emb_base=777).to_dict())
    assert len(read.rope.frequencies) == 2
