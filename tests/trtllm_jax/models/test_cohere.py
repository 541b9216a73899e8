from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Cohere2Config, CohereConfig

from trtllm_jax import convert_checkpoint
from trtllm_jax.models.cohere import COHERE, COHERE2, GGUF, Config

from .suite import GgufModelSuite
from .tiny import TinyModel

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}


def config(kind: type[CohereConfig] | type[Cohere2Config], **fields: Any) -> Any:
    """Two layers, with sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 64, "logit_scale": 0.5,
    }  # fmt: skip
    return kind(**copy.deepcopy(sizes | fields))


class TestCohere(GgufModelSuite):
    configs: ClassVar = {
        "6 and 3 heads": config(CohereConfig, use_qk_norm=True),
        "biases, not tied, yarn": config(
            CohereConfig,
            num_key_value_heads=2,
            head_dim=16,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=YARN,
            layer_norm_eps=1e-3,
        ),
        "as llama.cpp knows them": config(CohereConfig),
    }
    served = ("6 and 3 heads",)
    gguf: ClassVar = {"as llama.cpp knows them": "command-r"}
    slow = ("biases, not tied, yarn", "as llama.cpp knows them")


class TestCohere2(GgufModelSuite):
    configs: ClassVar = {
        "6 and 3 heads": config(Cohere2Config, num_hidden_layers=4, sliding_window=7),
        # Without rope a bias of keys changes nothing, so its gradient would be noise.
        "biases, not tied, only windows": config(
            Cohere2Config,
            num_key_value_heads=2,
            num_hidden_layers=3,
            attention_bias=True,
            tie_word_embeddings=False,
            sliding_window=9,
            layer_types=[SLIDING] * 3,
        ),
    }
    served = ("6 and 3 heads",)
    gguf: ClassVar = {"6 and 3 heads": "cohere2"}
    slow = ("biases, not tied, only windows",)


HF: dict[str, Any] = config(CohereConfig).to_dict() | {"architectures": [COHERE]}
HF2: dict[str, Any] = config(Cohere2Config).to_dict() | {"architectures": [COHERE2]}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_interleaved_heads_go_to_orbax_and_back_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    tiny = TinyModel(config(CohereConfig, use_qk_norm=True, attention_bias=True), tmp_path / "hf")
    orbax = convert_checkpoint(tiny.folder, tmp_path / "orbax", format="orbax")
    back = convert_checkpoint(orbax, tmp_path / "back")
    found, expected = (load_file(folder / "model.safetensors") for folder in (back, tiny.folder))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name].view(np.uint32), values.view(np.uint32), err_msg=name)


@pytest.mark.parametrize(("kind", "hf"), [(CohereConfig, HF), (Cohere2Config, HF2)])
def test_fields_that_may_be_absent(kind: type[CohereConfig] | type[Cohere2Config], hf: dict[str, Any]) -> None:
    bare = {name: hf[name] for name in REQUIRED}
    named = {"architectures": hf["architectures"]}
    assert Config.from_hf(bare | named) == Config.from_hf(kind(**bare).to_dict() | named)


def test_command_r_says_elsewhere_how_far_it_was_trained() -> None:
    assert Config.from_hf(HF | {"model_max_length": 131072}).max_position == 131072


def test_every_so_manyth_layer_sees_everything() -> None:
    bare = {name: HF2[name] for name in REQUIRED} | {"architectures": [COHERE2], "num_hidden_layers": 6}
    assert Config.from_hf(bare).windows == (4096, 4096, 4096, None, 4096, 4096)
    assert Config.from_hf(bare | {"sliding_window_pattern": 2}).windows == (4096, None) * 3


@pytest.mark.parametrize(("layers", "normalised"), [(40, False), (64, True)])
def test_gguf_files_of_many_layers_normalise_heads(layers: int, normalised: bool) -> None:
    assert GGUF[0].derived({"num_hidden_layers": layers}) == {"use_qk_norm": normalised}


@pytest.mark.parametrize(
    ("hf", "fields", "message"),
    [
        (HF, {"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        (HF, {"logit_scale": "1"}, r"logit_scale='1'; it must be a number of at least 0"),
        (HF, {"use_qk_norm": 1}, r"use_qk_norm=1; it must be true or false"),
        (HF2, {"use_qk_norm": True}, r"use_qk_norm=True; supported here: False, None"),
        (HF2, {"sliding_window": None}, r"config.json lacks sliding_window"),
        (HF2, {"layer_types": None, "sliding_window_pattern": 0}, r"sliding_window_pattern=0; it must be a whole"),
        (HF2, {"layer_types": [FULL]}, r"layer_types=\['full_attention'\]; it must be a list of num_hidden_layers=2"),
    ],
)
def test_fields_that_make_no_sense_are_named(hf: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(hf | fields)
