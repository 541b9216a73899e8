from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import OPTConfig

from trtllm_jax.models.opt import Config

from .suite import ModelSuite


def config(**fields: Any) -> OPTConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "ffn_dim": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return OPTConfig(**copy.deepcopy(sizes | fields))


class TestOPT(ModelSuite):
    configs: ClassVar = {
        "biases, tied": config(),
        "no biases, untied, another activation": config(
            enable_bias=False, tie_word_embeddings=False, activation_function="gelu"
        ),
        "350M: norms behind the blocks, projected embeddings": config(
            do_layer_norm_before=False, word_embed_proj_dim=26
        ),
        "norms before the blocks, projected embeddings, untied": config(
            word_embed_proj_dim=26, tie_word_embeddings=False
        ),
    }
    served = ("biases, tied", "350M: norms behind the blocks, projected embeddings")
    slow = ("no biases, untied, another activation", "norms before the blocks, projected embeddings, untied")


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(OPTConfig(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "mish"}, r"activation_function='mish'; supported here: 'relu', "),
        ({"do_layer_norm_before": 0}, r"do_layer_norm_before=0; it must be true or false"),
        ({"_remove_final_layer_norm": True}, r"_remove_final_layer_norm=True; supported here: False"),
        ({"layer_norm_elementwise_affine": False}, r"layer_norm_elementwise_affine=False; supported here: True"),
        ({"word_embed_proj_dim": 0}, r"word_embed_proj_dim=0; it must be a whole number from 1"),
        ({"num_attention_heads": 5}, r"hidden_size=48 is not a multiple of num_attention_heads=5"),
        ({"ffn_dim": None}, r"lacks ffn_dim"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
