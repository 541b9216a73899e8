from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import Exaone4Config

from trtllm_jax.models.exaone4 import Config

from .suite import GgufModelSuite

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def config(**fields: Any) -> Exaone4Config:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64,
    }  # fmt: skip
    return Exaone4Config(**copy.deepcopy(sizes | fields))


class TestExaone4(GgufModelSuite):
    configs: ClassVar = {
        "its pattern": config(num_hidden_layers=5, sliding_window=7),
        "no windows, tied, llama3": config(
            sliding_window=None, layer_types=["full_attention"] * 2, tie_word_embeddings=True, rope_parameters=LLAMA3
        ),
        "layer types, head_dim": config(
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=5,
            layer_types=["full_attention", "sliding_attention"],
            rms_norm_eps=1e-3,
        ),
    }
    served = ("its pattern",)
    gguf: ClassVar = {"its pattern": "exaone4"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED} | {"num_attention_heads": 32, "hidden_size": 64}
    for fields in (bare, bare | {"num_hidden_layers": 9, "sliding_window_pattern": 3}):
        assert Config.from_hf(fields) == Config.from_hf(Exaone4Config(**fields).to_dict())


def test_files_without_windows_rotate_every_layer() -> None:
    for fields in ({"sliding_window": None}, {"sliding_window": None, "layer_types": None}):
        read = Config.from_hf(HF | fields)
        assert (read.windows, read.rotate_all) == ((None, None), True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"layer_types": None, "sliding_window_pattern": "LLLG"}, r"sliding_window_pattern='LLLG'; it must be a whole"),
        ({"layer_types": ["chunked_attention"] * 2}, r"layer_types=.* must be a list"),
        ({"sliding_window": 0}, r"sliding_window=0; it must be a whole number"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
