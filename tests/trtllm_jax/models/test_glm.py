from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
from transformers import Glm4Config, GlmConfig

from trtllm_jax.models.glm import GLM, GLM4, Config

from .suite import GgufModelSuite

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}


def config(kind: type[GlmConfig] | type[Glm4Config], **fields: Any) -> Any:
    """Two layers, with sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return kind(**copy.deepcopy(sizes | fields))


class TestGlm(GgufModelSuite):
    configs: ClassVar = {
        "6 and 3 heads": config(GlmConfig),
        "no biases, tied, whole heads": config(
            GlmConfig,
            num_key_value_heads=2,
            attention_bias=False,
            tie_word_embeddings=True,
            partial_rotary_factor=1.0,
        ),
    }
    served = ("6 and 3 heads",)
    gguf: ClassVar = {"6 and 3 heads": "chatglm"}
    slow = ("no biases, tied, whole heads",)


class TestGlm4(GgufModelSuite):
    configs: ClassVar = {
        "6 and 3 heads": config(Glm4Config, rms_norm_eps=1e-5),
        "no biases, tied, a quarter of each head, yarn": config(
            Glm4Config,
            num_key_value_heads=2,
            attention_bias=False,
            tie_word_embeddings=True,
            partial_rotary_factor=0.25,
            rope_parameters=YARN,
        ),
    }
    served = ("6 and 3 heads",)
    gguf: ClassVar = {"6 and 3 heads": "glm4"}
    slow = ("no biases, tied, a quarter of each head, yarn",)


HF: dict[str, Any] = config(GlmConfig).to_dict()
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize(("kind", "name"), [(GlmConfig, GLM), (Glm4Config, GLM4)])
def test_fields_that_may_be_absent(kind: type[GlmConfig] | type[Glm4Config], name: str) -> None:
    bare = {field: HF[field] for field in REQUIRED}
    named = {"architectures": [name]}
    read = Config.from_hf(bare | named)
    assert read == Config.from_hf(kind(**bare).to_dict() | named)
    assert (read.rotary, read.normalised_blocks) == (64, name == GLM4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"attention_bias": 1}, r"attention_bias=1; it must be true or false"),
        ({"rope_parameters": {"partial_rotary_factor": 0.75}}, r"rope rotates 12 of 16 channels of a head in pairs"),
        ({"rope_parameters": {"partial_rotary_factor": 0.19}}, r"rope rotates 3 of 16 channels of a head in pairs"),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, r"partial_rotary_factor=2, which rotates 32 of 16"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)
