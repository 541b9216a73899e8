from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import FalconConfig

from trtllm_jax.models.falcon import Config

from .suite import WHOLE, ModelSuite
from .tiny import TinyModel


def config(**fields: Any) -> FalconConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "ffn_hidden_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return FalconConfig(**copy.deepcopy(sizes | fields))


ALIBI: dict[str, Any] = {"alibi": True, "attn_implementation": "sdpa"}
"""Transformers' eager attention adds ALiBi a second time with the mask."""


class TestFalcon(ModelSuite):
    configs: ClassVar = {
        "groups of heads": config(new_decoder_architecture=True, num_kv_heads=3),
        "groups of heads, one norm, biases, not tied": config(
            new_decoder_architecture=True,
            num_kv_heads=2,
            num_ln_in_parallel_attn=1,
            bias=True,
            tie_word_embeddings=False,
            activation="relu",
        ),
        "one key-value head": config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}),
        "one key-value head that four devices share": config(
            num_attention_heads=8, bias=True, parallel_attn=False, ffn_hidden_size=None
        ),
        "a key-value head for each, one block after the other": config(
            multi_query=False, parallel_attn=False, bias=True, layer_norm_epsilon=1e-3
        ),
        "ALiBi, a key-value head for each": config(**ALIBI, multi_query=False, parallel_attn=False, bias=True),
        "ALiBi, one key-value head that four devices share": config(**ALIBI, num_attention_heads=8),
        "ALiBi, groups of heads": config(**ALIBI, new_decoder_architecture=True, num_kv_heads=3),
    }
    served = ("groups of heads", "ALiBi, a key-value head for each")
    slow = tuple(configs)[1:]


@pytest.mark.multi_device(4)
def test_more_devices_than_groups_of_heads_are_refused(tmp_path: Path) -> None:
    tiny = TinyModel(config(new_decoder_architecture=True, num_kv_heads=2, num_attention_heads=8), tmp_path)
    with pytest.raises(ValueError, match=r"tensor_parallel_size is more than num_kv_heads=2.*lower it"):
        tiny.split(4).logits([tiny.prompt(41), tiny.prompt(12)], WHOLE)


HF: dict[str, Any] = config().to_dict()
NEWER: dict[str, Any] = HF | {"new_decoder_architecture": True}
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("newer", [False, True])
def test_fields_that_may_be_absent(newer: bool) -> None:
    bare = {name: HF[name] for name in REQUIRED} | {"new_decoder_architecture": newer}
    assert Config.from_hf(bare) == Config.from_hf(FalconConfig(**bare).to_dict())


@pytest.mark.parametrize(
    ("hf", "fields", "message"),
    [
        (HF, {"alibi": 1}, r"alibi=1; it must be true or false"),
        (HF, {"activation": "mish"}, r"activation='mish'; supported here: 'gelu'"),
        (HF, {"hidden_size": 50}, r"hidden_size=50 is not a multiple of num_attention_heads=6"),
        (HF, {"num_ln_in_parallel_attn": 2}, r"num_ln_in_parallel_attn=2; supported here: None, 1"),
        (HF, {"multi_query": False, "num_kv_heads": 3}, r"num_kv_heads=3; supported here: 6, None"),
        (NEWER, {"num_kv_heads": 4}, r"num_attention_heads=6 is not a multiple of num_kv_heads=4"),
        (NEWER, {"num_ln_in_parallel_attn": 3}, r"num_ln_in_parallel_attn=3; supported here: None, 2, 1"),
        (NEWER, {"parallel_attn": False}, r"parallel_attn=False; supported here: True"),
    ],
)
def test_fields_that_make_no_sense_are_named(hf: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(hf | fields)
