from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import pytest
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from sharding import make_mesh
from trtllm_jax.engine import kv_cache
from trtllm_jax.engine.kv_cache import CacheSpec, pool_columns
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.models.gemma3 import GGUF, Config, cache_spec

from .seeing import check_language_model, random_weights
from .suite import GgufModelSuite

FULL, LOCAL = "full_attention", "sliding_attention"
LINEAR = {FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}, LOCAL: {"rope_theta": 1e4}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}


def config(**fields: Any) -> Gemma3TextConfig:
    """Three layers, with sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 64, "query_pre_attn_scalar": 10,
        "sliding_window": 7, "layer_types": [LOCAL, FULL, LOCAL],
    }  # fmt: skip
    return Gemma3TextConfig(**copy.deepcopy(sizes | fields))


class TestGemma3(GgufModelSuite):
    configs: ClassVar = {
        "6 and 3 heads": config(final_logit_softcapping=5.0),
        "biases, not tied, yarn": config(
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters={FULL: YARN, LOCAL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4}},
            layer_types=[FULL, FULL, LOCAL],
        ),
        "7 layers as llama.cpp knows them, linear": config(
            num_hidden_layers=7, query_pre_attn_scalar=16, rope_parameters=LINEAR, layer_types=None
        ),
    }
    served = ("6 and 3 heads",)
    gguf: ClassVar = {"7 layers as llama.cpp knows them, linear": "gemma3"}
    slow = ("biases, not tied, yarn", "7 layers as llama.cpp knows them, linear")


HF: dict[str, Any] = config().to_dict()


def test_fields_that_may_be_absent() -> None:
    """Published files of models that see pictures state few of them."""
    read = Config.from_hf({})
    assert read == Config.from_hf(Gemma3TextConfig().to_dict())
    assert (read.windows[:7], read.query_scale) == ((4096,) * 5 + (None, 4096), 1 / 16)
    assert read.rope.frequencies != read.local_rope.frequencies


def test_files_before_transformers_5() -> None:
    old = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    }
    read = Config.from_hf(old)
    assert read == Config.from_hf(Gemma3TextConfig(**copy.deepcopy(old)).to_dict())
    assert (read.windows[:4], read.max_position) == ((4096, 4096, None, 4096), 131072)
    assert read.local_rope.frequencies[0] == 1.0
    assert read.rope.frequencies[0] == 1 / 8


@pytest.mark.parametrize(("layers", "scalar"), [(34, 128), (62, 168)])
def test_gguf_files_of_27b_scale_queries_by_the_stream(layers: int, scalar: int) -> None:
    sizes = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128, "num_hidden_layers": layers}
    assert GGUF[0].derived(sizes) == {"query_pre_attn_scalar": scalar}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, r"hidden_activation='gelu'; supported here: 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, r"use_bidirectional_attention=True; supported here: None, False"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0; supported here: None"),
        ({"sliding_window": None}, r"config.json lacks sliding_window"),
        ({"layer_types": None, "sliding_window_pattern": 0}, r"sliding_window_pattern=0; it must be a whole number"),
        ({"layer_types": ["chunked_attention"] * 3}, r"layer_types=\['chunked_attention'"),
        ({"rope_parameters": {"rope_type": "default"}}, r"rope_parameters=.*must have an object for each type"),
        ({"rope_parameters": {LOCAL: {"rope_type": "longer"}}}, r"rope_type 'longer', which is not supported"),
        ({"final_logit_softcapping": 0}, r"final_logit_softcapping=0; it must be a number above 0"),
        ({"text_config": None}, r"text_config=None; it must be an object"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "not tied"])
def seeing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Gemma3ForConditionalGeneration, Path]:
    """A tiny model that sees pictures, and its folder."""
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = config(tie_word_embeddings=request.param).to_dict()
    whole = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=request.param
    )
    model = random_weights(Gemma3ForConditionalGeneration(whole))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_the_language_model_of_one_that_sees_pictures(
    seeing: tuple[Gemma3ForConditionalGeneration, Path],
) -> None:
    """Its tensors have other names, and those of the eye are left alone."""
    reference, folder = seeing
    check_language_model(reference, folder, "language_model.")


@pytest.mark.parametrize(
    ("layers", "kv_heads", "window", "gain"), [(18, 1, 512, 5.9), (48, 8, 1024, 5.85)], ids=["270M", "12B"]
)
def test_a_long_context_takes_the_memory_of_its_windows(
    monkeypatch: pytest.MonkeyPatch, layers: int, kv_heads: int, window: int, gain: float
) -> None:
    """In the memory of eight sequences of 32,768 tokens whose layers would all keep everything."""
    sequences, context = 8, 32768
    sizes = {"num_hidden_layers": layers, "num_key_value_heads": kv_heads, "num_attention_heads": 2 * kv_heads}
    model = Config.from_hf(sizes | {"head_dim": 256, "sliding_window": window, "max_position_embeddings": context})
    limits = SchedulerLimits(sequences, max_num_tokens=512, max_seq_len=context, max_decode_steps=1)
    mesh = make_mesh(1)
    spec = CacheSpec.of(cache_spec(model), model.sizes, 32, jnp.dtype("bfloat16"), mesh)

    of_token = 2 * kv_heads * 256 * 2  # key and value of a layer, in bytes
    memory = sequences * context * layers * of_token
    windowed = [index for index in range(layers) if (index + 1) % 6]
    left = memory - sequences * window * len(windowed) * of_token
    expected = left // ((layers - len(windowed)) * of_token)

    monkeypatch.setattr(kv_cache, "CPU_POOL_BYTES", memory)
    tokens = (pool_columns(spec, mesh, limits, 1.0, 0, None) - 1) * 32
    # Of the rest a little more than windows is kept of each sequence, and the number of columns is round.
    assert 0.97 * expected < tokens <= expected
    assert expected / (sequences * context) == pytest.approx(gain, abs=0.03)
