from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import HunYuanDenseV1Config

from trtllm_jax.models.hunyuan_v1_dense import Config

from .suite import GgufModelSuite

ALPHA = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 1.0, "alpha": 50.0}


def config(**fields: Any) -> HunYuanDenseV1Config:
    """Sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    return HunYuanDenseV1Config(**copy.deepcopy(sizes | fields))


class TestHunYuanDense(GgufModelSuite):
    configs: ClassVar = {
        "grouped, alpha": config(rope_parameters=ALPHA),
        "biases, tied, plain rope": config(
            num_key_value_heads=1, head_dim=8, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3
        ),
    }
    served = ("grouped, alpha",)
    gguf: ClassVar = {"grouped, alpha": "hunyuan-dense"}
    slow = tuple(configs)[1:]


HF: dict[str, Any] = config().to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def test_fields_that_may_be_absent() -> None:
    """Transformers gives them these values."""
    bare = {name: HF[name] for name in REQUIRED}
    assert Config.from_hf(bare) == Config.from_hf(HunYuanDenseV1Config(**bare, pad_token_id=None).to_dict())


def test_older_files_have_another_name_for_the_rope() -> None:
    older = {name: value for name, value in HF.items() if name != "rope_parameters"}
    scaling = {"type": "dynamic", "factor": 1.0, "alpha": 50.0, "beta_fast": 32, "mscale": 1.0}
    read = Config.from_hf(older | {"rope_theta": 500.0, "rope_scaling": scaling})
    assert read == Config.from_hf(config(rope_parameters=ALPHA).to_dict())
    assert read.max_position == 64
    assert read.rope.longer is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"use_cla": True}, r"use_cla=True; supported here: False, None"),
        ({"rope_parameters": ALPHA | {"alpha": 0}}, r"alpha=0; it must be a number above 0"),
        ({"rope_parameters": ALPHA, "head_dim": 2}, r"head_dim=2; with alpha in rope_scaling it must be at least 4"),
        ({"rope_parameters": ALPHA | {"alpha": None, "factor": "x"}}, r"factor='x'"),
    ],
)
def test_other_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
