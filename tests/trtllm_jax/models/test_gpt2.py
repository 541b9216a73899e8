from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config

from trtllm_jax import load_model
from trtllm_jax.models.gpt2 import Config

from .suite import GgufModelSuite
from .tiny import TinyModel


def config(**fields: Any) -> GPT2Config:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "n_embd": 48, "n_inner": 90, "n_layer": 2, "n_head": 6, "n_positions": 64,
    }  # fmt: skip
    return GPT2Config(**copy.deepcopy(sizes | fields))


class TestGPT2(GgufModelSuite):
    configs: ClassVar = {
        "tied": config(),
        "untied, scaled by layer": config(
            n_layer=3, n_inner=None, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True
        ),
        "not scaled, another activation": config(
            scale_attn_weights=False, activation_function="relu", layer_norm_epsilon=1e-3, reorder_and_upcast_attn=True
        ),
    }
    served = ("tied",)
    gguf: ClassVar = {"tied": "gpt2"}
    slow = tuple(configs)[1:]


def test_the_first_files_lack_a_prefix_and_have_the_causal_masks(tmp_path: Path) -> None:
    tiny = TinyModel(config(n_layer=1), tmp_path / "new")
    shutil.copytree(tiny.folder, tmp_path / "old")
    tensors = {
        name.removeprefix("transformer."): values
        for name, values in load_file(tiny.folder / "model.safetensors").items()
    }
    mask = np.tri(64, dtype=np.float32)[None, None]
    save_file(tensors | {"h.0.attn.bias": mask}, tmp_path / "old" / "model.safetensors")
    (_, new), (_, old) = (load_model(tmp_path / name, dtype="float32") for name in ("new", "old"))
    jax.tree.map(np.testing.assert_array_equal, new, old)


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(GPT2Config(**bare).to_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "mish"}, r"activation_function='mish'; supported here: 'gelu_new', .*'relu2'"),
        ({"add_cross_attention": True}, r"add_cross_attention=True; supported here: False"),
        ({"n_embd": None}, r"lacks n_embd"),
        ({"n_head": 5}, r"n_embd=48 is not a multiple of n_head=5"),
        ({"n_layer": 0}, r"n_layer=0; it must be a whole number"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
