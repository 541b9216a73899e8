from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig

from sharding import make_mesh
from trtllm_jax import generate_fn
from trtllm_jax.engine import kv_cache
from trtllm_jax.engine.kv_cache import CacheSpec, pool_columns
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.models.llama4 import Config, cache_spec, same_layer
from trtllm_jax.nn.reach import EVERYTHING, Reach

from .seeing import check_language_model, random_weights
from .suite import ModelSuite
from .tiny import TinyModel

FULL, CHUNKED = "full_attention", "chunked_attention"
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def config(**fields: Any) -> Llama4TextConfig:
    """Dense layers with sizes that four devices do not divide, and chunks of which the prompts have several."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 33, "intermediate_size_mlp": 90,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
        "max_position_embeddings": 64, "moe_layers": [], "attention_chunk_size": 7, "floor_scale": 9, "attn_scale": 0.7,
        "rope_parameters": LLAMA3,
    }  # fmt: skip
    return Llama4TextConfig(**copy.deepcopy(sizes | fields))


class TestLlama4(ModelSuite):
    configs: ClassVar = {
        "its pattern": config(),
        "biases, no norms, chunks without rope, tied": config(
            num_hidden_layers=3,
            num_key_value_heads=2,
            attention_bias=True,
            use_qk_norm=False,
            tie_word_embeddings=True,
            no_rope_layers=[1, 0, 1],
            layer_types=[FULL, CHUNKED, CHUNKED],
            attention_chunk_size=8,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        "every second layer, queries do not grow": config(
            num_hidden_layers=2, no_rope_layer_interval=2, attn_temperature_tuning=False, attention_chunk_size=16
        ),
        "chunks only": config(num_hidden_layers=2, no_rope_layers=[1, 1], attention_chunk_size=5),
    }
    served = ("its pattern", "chunks only")
    slow = tuple(configs)[1:]

    def test_generating_without_an_engine_crosses_chunks(self, tiny: TinyModel) -> None:
        lengths, new = np.array([17, 40]), 12
        prompts = [tiny.prompt(length) for length in lengths]
        padded = np.array([prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts])
        out = jax.jit(generate_fn(tiny.model, new, end_ids=()))(tiny.split().params, padded, lengths)
        assert out.tokens.tolist() == [tiny.expected_tokens(prompt, new) for prompt in prompts]


HF: dict[str, Any] = config().to_dict()


def test_fields_that_may_be_absent() -> None:
    """Published files leave the layers without a rope to the interval, with a list that is empty."""
    stated = {"moe_layers": [], "no_rope_layers": []}
    read = Config.from_hf(stated)
    assert read == Config.from_hf(Llama4TextConfig(**copy.deepcopy(stated)).to_dict())
    assert (read.rotated[:5], read.chunks[:5]) == ((True, True, True, False, True), (8192, 8192, 8192, None, 8192))
    assert (read.mlp, read.query_scale, read.normalises_heads) == (16384, (0.1, 8192, False), True)


def test_layers_of_one_kind_are_one_program_and_layers_that_see_as_far_one_cache_group() -> None:
    read = Config.from_hf(config(no_rope_layers=[1, 0, 1, 0], layer_types=[CHUNKED, FULL, CHUNKED, CHUNKED]).to_dict())
    assert [same_layer(read, index) for index in range(4)] == [0, 1, 0, 3]
    assert [(group.layers, group.reach) for group in cache_spec(read)] == [
        ((1,), EVERYTHING),
        ((0, 2, 3), Reach(chunk=7)),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'; supported here: 'silu'"),
        ({"moe_layers": [1, 3]}, r"moe_layers=\[1, 3\], by which layer 1 is a mixture of experts; .*moe_layers=\[\]"),
        ({"moe_layers": None}, r"interleave_moe_layer_step=1, by which layer 0 is a mixture of experts"),
        ({"moe_layers": None, "interleave_moe_layer_step": 2}, r"interleave_moe_layer_step=2, by which layer 1 is"),
        ({"moe_layers": None, "interleave_moe_layer_step": 0}, r"interleave_moe_layer_step=0; it must be a whole"),
        ({"moe_layers": 3}, r"moe_layers=3; it must be a list of layers"),
        ({"layer_types": ["sliding_attention"] * 4}, r"layer_types=\['sliding_attention'.*'chunked_attention' or"),
        ({"attention_chunk_size": None}, r"config.json lacks attention_chunk_size"),
        ({"attention_chunk_size": 0}, r"attention_chunk_size=0; it must be a whole number from 1"),
        ({"intermediate_size_mlp": None}, r"config.json lacks intermediate_size_mlp"),
        ({"floor_scale": 0}, r"floor_scale=0; it must be a whole number from 1"),
        ({"attn_temperature_tuning": 4}, r"attn_temperature_tuning=4; it must be true or false"),
        ({"no_rope_layers": [1, 2]}, r"no_rope_layers=\[1, 2\]; it must be a list of num_hidden_layers=4 numbers"),
        ({"text_config": None}, r"text_config=None; it must be an object"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)


def test_a_step_beyond_the_last_layer_leaves_them_dense() -> None:
    assert Config.from_hf(HF | {"moe_layers": None, "interleave_moe_layer_step": 5}) == Config.from_hf(HF)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["not tied", "tied"])
def seeing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Llama4ForConditionalGeneration, Path]:
    """A tiny model that sees pictures, and its folder; what is stated beside the text's fields ties nothing."""
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    text = config(tie_word_embeddings=request.param).to_dict()
    whole = Llama4Config(text_config=text, vision_config=vision, tie_word_embeddings=not request.param)
    model = random_weights(Llama4ForConditionalGeneration(whole))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_the_language_model_of_one_that_sees_pictures(seeing: tuple[Llama4ForConditionalGeneration, Path]) -> None:
    """Its tensors have other names, and those of the eye are left alone."""
    check_language_model(*seeing, "language_model.")


def test_a_long_context_takes_the_memory_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the memory of four sequences of 131,072 tokens whose layers would all keep everything."""
    sequences, context, chunk, layers = 4, 131072, 8192, 8
    sizes = {"num_hidden_layers": layers, "attention_chunk_size": chunk, "max_position_embeddings": context}
    model = Config.from_hf(sizes | {"moe_layers": []})
    limits = SchedulerLimits(sequences, max_num_tokens=512, max_seq_len=context, max_decode_steps=1)
    mesh = make_mesh(1)
    spec = CacheSpec.of(cache_spec(model), model.sizes, 32, jnp.dtype("bfloat16"), mesh)

    of_token = 2 * 8 * 128 * 2  # key and value of a layer, in bytes
    memory = sequences * context * layers * of_token
    chunked = [index for index in range(layers) if (index + 1) % 4]
    left = memory - sequences * chunk * len(chunked) * of_token
    expected = left // ((layers - len(chunked)) * of_token)

    monkeypatch.setattr(kv_cache, "CPU_POOL_BYTES", memory)
    tokens = (pool_columns(spec, mesh, limits, 1.0, 0, None) - 1) * 32
    # Of the rest a little more than chunks is kept of each sequence, and the number of columns is round.
    assert 0.97 * expected < tokens <= expected
    assert expected / (sequences * context) == pytest.approx(3.81, abs=0.01)
