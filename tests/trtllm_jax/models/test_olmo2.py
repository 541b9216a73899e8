from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import Olmo2Config, Olmo3Config

from trtllm_jax.functional.research import open_model
from trtllm_jax.models.olmo2 import Config

from .gguf_writer import write_gguf
from .suite import GgufModelSuite
from .tiny import TinyModel

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config(kind: type[Olmo2Config] | type[Olmo3Config] = Olmo2Config, **fields: Any) -> Any:
    """Sizes that four devices do not divide."""
    return kind(**copy.deepcopy(SIZES | fields))


class TestOlmo2(GgufModelSuite):
    configs: ClassVar = {
        "grouped": config(),
        "multi-head, biases, tied": config(
            num_key_value_heads=None, attention_bias=True, tie_word_embeddings=True, rope_scaling=YARN
        ),
        "8 and 2 heads": config(num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-2),
        "olmo3, its pattern, yarn": config(Olmo3Config, num_hidden_layers=5, sliding_window=7, rope_scaling=YARN),
        "olmo3, windows only": config(
            Olmo3Config, layer_types=["sliding_attention"] * 2, sliding_window=5, attention_bias=True
        ),
    }
    served = ("olmo3, its pattern, yarn",)
    gguf: ClassVar = {"grouped": "olmo2"}
    slow = tuple(configs)[1:]


HF = config().to_dict() | {"architectures": ["Olmo2ForCausalLM"]}
HF3 = config(Olmo3Config, num_hidden_layers=5).to_dict() | {"architectures": ["Olmo3ForCausalLM"]}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("kind", [Olmo2Config, Olmo3Config])
def test_fields_that_may_be_absent(kind: Any) -> None:
    """Older files state few of them; transformers gives them these values."""
    bare: dict[str, Any] = {name: HF[name] for name in REQUIRED}
    name = {"architectures": [kind.__name__.replace("Config", "ForCausalLM")]}
    assert Config.from_hf(bare | name) == Config.from_hf(kind(**bare).to_dict() | name)


def test_older_files_of_olmo_3_scale_the_layers_that_see_everything() -> None:
    older = {name: value for name, value in HF3.items() if name != "rope_parameters"}
    read = Config.from_hf(older | {"rope_theta": 500000, "rope_scaling": YARN})
    expected = config(Olmo3Config, num_hidden_layers=5, rope_scaling=YARN).to_dict()
    assert read == Config.from_hf(expected | {"architectures": HF3["architectures"]})
    assert read.sliding_rope != read.full_rope


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (HF | {"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        (HF | {"sliding_window": 7}, r"sliding_window=7; supported here: None"),
        (HF | {"attention_bias": 1}, r"attention_bias=1; it must be true or false"),
        (HF3 | {"layer_types": ["chunked_attention"] * 5}, r"layer_types=.* must be a list"),
        (HF3 | {"rope_parameters": [1]}, r"rope_parameters="),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(fields)


@pytest.mark.slow
def test_gguf_files_of_olmo_3_are_refused(tmp_path: Path) -> None:
    """llama.cpp gives them the name of OLMo 2."""
    tiny = TinyModel(config(Olmo3Config, sliding_window=7), tmp_path / "hf")
    with pytest.raises(ValueError, match=r"sliding_window=7; supported here: None"):
        open_model(write_gguf(tiny.folder, tmp_path / "olmo3.gguf", "olmo2"))
