from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import Phi3Config

from trtllm_jax.models import phi3
from trtllm_jax.models.phi3 import Config
from trtllm_jax.nn.model import Model

from .suite import GgufModelSuite


def longrope(pairs: int) -> dict[str, Any]:
    """Divisors that differ from pair to pair, and much more so in long sequences."""
    short, long = ([1 + step * pair for pair in range(pairs)] for step in (0.05, 0.6))
    return {"type": "longrope", "short_factor": short, "long_factor": long}


def config(**fields: Any) -> Phi3Config:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return Phi3Config(**copy.deepcopy(sizes | fields))


class TestPhi3(GgufModelSuite):
    """The longer prompt is longer than the lengths that LongRoPE says were trained, the shorter one is not."""

    configs: ClassVar = {
        "grouped, longrope": config(rope_scaling=longrope(4), original_max_position_embeddings=32),
        "multi-head, window": config(num_key_value_heads=None, sliding_window=7),
        "8 and 2 heads, tied, part of a head is rotated": config(
            hidden_size=128,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            partial_rotary_factor=0.75,
            rope_scaling=longrope(6),
            original_max_position_embeddings=16,
            sliding_window=20,
        ),
    }
    served = ("grouped, longrope",)
    gguf: ClassVar = {"multi-head, window": "phi3"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(Phi3Config(**bare, pad_token_id=None).to_dict())


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_older_files_have_other_names_for_longrope(kind: str) -> None:
    older = {name: value for name, value in HF.items() if name != "rope_parameters"}
    scaling = longrope(4) | {"type": kind}
    read = Config.from_hf(older | {"rope_scaling": scaling, "original_max_position_embeddings": 16})
    assert read.rope.longer is not None
    assert read.rope.longer.trained == 16
    theirs = config(rope_scaling=longrope(4), original_max_position_embeddings=16).to_dict()
    assert read == Config.from_hf(theirs)


def test_gguf_files_state_a_window_of_0_for_none() -> None:
    assert Config.from_hf(HF | {"sliding_window": 0}) == Config.from_hf(HF)


def test_prefixes_of_long_prompts_are_kept_apart() -> None:
    long = Config.from_hf(HF | {"rope_scaling": longrope(4), "original_max_position_embeddings": 16})
    assert Model(phi3, long).rope_stretch == 16
    assert Model(phi3, Config.from_hf(HF)).rope_stretch is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"attention_bias": True}, r"attention_bias=True; supported here: False"),
        ({"sliding_window": -1}, r"sliding_window=-1; it must be a whole number"),
        ({"rope_scaling": longrope(3)}, r"short_factor=.*; it must be a list of 4 numbers"),
        ({"rope_scaling": {"type": "longest"}}, r"rope_type 'longest', which is not supported"),
        ({"partial_rotary_factor": 2.0, "rope_parameters": None}, r"partial_rotary_factor=2"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
