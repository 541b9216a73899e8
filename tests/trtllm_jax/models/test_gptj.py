from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import GPTJConfig

from trtllm_jax import load_model
from trtllm_jax.models.gptj import Config

from .suite import ModelSuite
from .tiny import TinyModel


def config(**fields: Any) -> GPTJConfig:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "n_embd": 48, "n_inner": 90, "n_layer": 2, "n_head": 6, "n_positions": 64, "rotary_dim": 4,
    }  # fmt: skip
    return GPTJConfig(**copy.deepcopy(sizes | fields))


class TestGPTJ(ModelSuite):
    configs: ClassVar = {
        "a half of each head": config(),
        "whole heads, tied, no inner size": config(
            rotary_dim=8, tie_word_embeddings=True, n_inner=None, activation_function="relu", layer_norm_epsilon=1e-3
        ),
    }
    served = ("a half of each head",)
    slow = ("whole heads, tied, no inner size",)


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")


def test_fields_that_may_be_absent() -> None:
    bare = {name: HF[name] for name in REQUIRED} | {"n_embd": 384}
    assert Config.from_hf(bare) == Config.from_hf(GPTJConfig(**bare).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": None}, r"config.json lacks n_embd"),
        ({"n_embd": 50}, r"n_embd=50 is not a multiple of n_head=6"),
        ({"rotary_dim": 6}, r"rope rotates 6 of 8 channels of a head in pairs"),
        ({"rotary_dim": 16}, r"rope rotates 16 of 8 channels of a head in pairs"),
        ({"rotary_dim": 0}, r"rotary_dim=0; it must be a whole number"),
        ({"activation_function": "mish"}, r"activation_function='mish'; supported here: 'gelu_new'"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling=\{'type': 'linear'\}; supported here: None"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)


def test_older_files_have_the_causal_mask(tmp_path: Path) -> None:
    tiny = TinyModel(config(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mask = np.tril(np.ones((1, 1, 64, 64), bool))
    save_file(tensors | {"transformer.h.0.attn.bias": mask}, tmp_path / "model.safetensors")
    _, params = load_model(tiny.folder, dtype="float32")
    np.testing.assert_array_equal(params["embed"], tensors["transformer.wte.weight"])
