from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig

from sharding import make_mesh
from trtllm_jax import generate_fn
from trtllm_jax.engine.kv_cache import CacheSpec
from trtllm_jax.engine.steps import copy_pages
from trtllm_jax.models import gemma4
from trtllm_jax.models.gemma4 import Config, cache_of, cache_spec, same_layer
from trtllm_jax.nn.model import Model

from .seeing import check_language_model, random_weights
from .suite import ModelSuite
from .tiny import TinyModel

FULL, LOCAL = "full_attention", "sliding_attention"


def config(**fields: Any) -> Gemma4TextConfig:
    """Six layers, of which the last three share keys and values, with sizes that four devices do not divide."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "vocab_size_per_layer_input": 101, "hidden_size": 48, "hidden_size_per_layer_input": 10,
        "intermediate_size": 90, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3,
        "head_dim": 16, "global_head_dim": 24, "max_position_embeddings": 64, "sliding_window": 7,
        "layer_types": [LOCAL, LOCAL, FULL, LOCAL, FULL, FULL], "num_kv_shared_layers": 3,
    }  # fmt: skip
    return Gemma4TextConfig(**copy.deepcopy(sizes | fields))


class TestGemma4(ModelSuite):
    configs: ClassVar = {
        "sharing, double-wide, capped": config(use_double_wide_mlp=True, final_logit_softcapping=5.0),
        "sharing, biases, 2 groups": config(num_key_value_heads=2, attention_bias=True),
        # Transformers does not compute models that share without inputs of layers.
        "nothing shared, no inputs of layers, not tied": config(
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            layer_types=[FULL, LOCAL, FULL],
            num_hidden_layers=3,
            tie_word_embeddings=False,
        ),
        "sharing, keys are values, repeated heads": config(
            attention_k_eq_v=True,
            attention_bias=True,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_global_key_value_heads=2,
        ),
        "31B: keys are values, other heads": config(
            attention_k_eq_v=True,
            num_global_key_value_heads=2,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            layer_types=[LOCAL, LOCAL, FULL],
            num_hidden_layers=3,
        ),
    }
    served = ("sharing, double-wide, capped", "31B: keys are values, other heads")
    slow = tuple(configs)[1:-1]

    @pytest.mark.slow
    def test_a_generation_allocates_the_caches_of_owners(self, tiny: TinyModel) -> None:
        prompt = tiny.prompt(17)
        generate = jax.jit(generate_fn(tiny.model, 8, end_ids=()))
        found = generate(tiny.split().params, jnp.array([prompt, prompt[::-1]]), jnp.array([17, 17]))
        assert found.tokens[0].tolist() == tiny.expected_tokens(prompt, 8)


HF: dict[str, Any] = config().to_dict()


def test_fields_that_may_be_absent() -> None:
    read = Config.from_hf({})
    assert read == Config.from_hf(Gemma4TextConfig().to_dict())
    assert (read.windows[:7], read.full_head_dim) == ((512,) * 5 + (None, 512), 512)
    assert (
        read.windows == Config.from_hf({"layer_types": [LOCAL if window else FULL for window in read.windows]}).windows
    )


def test_the_last_layer_sees_everything() -> None:
    """Whatever is stated of it, as in transformers."""
    stated = HF | {"layer_types": [LOCAL, FULL, LOCAL] * 2, "per_layer_config": None}
    assert Config.from_hf(stated).windows == (7, None, 7, 7, None, None)


def test_the_size_of_heads_is_stated_in_two_ways() -> None:
    published = {name: value for name, value in HF.items() if name != "per_layer_config"} | {"global_head_dim": 24}
    assert Config.from_hf(published) == Config.from_hf(HF)


@pytest.mark.parametrize("keys_are_values", [True, False])
def test_the_number_of_key_value_heads_is_stated_in_two_ways(keys_are_values: bool) -> None:
    """The older way counts only where values are keys."""
    published = {name: value for name, value in HF.items() if name != "per_layer_config"}
    published |= {"global_head_dim": 24, "num_global_key_value_heads": 2, "attention_k_eq_v": keys_are_values}
    read = Config.from_hf(published)
    assert read == Config.from_hf(Gemma4TextConfig(**copy.deepcopy(published)).to_dict())
    assert read.full_kv_heads == (2 if keys_are_values else 3)


def test_layers_that_share_have_no_cache_of_their_own() -> None:
    """The memory of a token is that of the owners, whose heads differ in size."""
    model = Config.from_hf(HF)
    spec = CacheSpec.of(cache_spec(model), model.sizes, 4, jnp.dtype("float32"), make_mesh(1))
    assert [group.layers for group in spec.groups] == [(2,), (0, 1)]
    assert [cache_of(model, index) for index in range(6)] == [0, 1, 2, 1, 2, 2]
    assert [same_layer(model, index) for index in range(6)] == [0, 1, 2, 3, 4, 4]
    arrays = spec.arrays((5, 9))
    assert [array.shape for array in arrays] == [(9, 2, 3, 4, 16)] * 2 + [(5, 2, 3, 4, 24)]
    of_page = [3 * 4 * 2 * size * 4 for size in (24, 16)]
    assert spec.bytes_of((5, 9)) == 5 * of_page[0] + 2 * 9 * of_page[1]


def test_the_pages_of_owners_are_copied() -> None:
    model = Model(gemma4, Config.from_hf(HF))
    caches = tuple(jnp.arange(3.0) + 10 * owner for owner in range(3))
    copied = copy_pages(model, 0, caches, jnp.array([[1, 2]]))
    np.testing.assert_array_equal(copied, [[0, 1, 2], [10, 11, 12], [20, 21, 21]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, r"hidden_activation='gelu'; supported here: 'gelu_pytorch_tanh'"),
        ({"enable_moe_block": True}, r"enable_moe_block=True; supported here: False"),
        ({"attention_k_eq_v": 1}, r"attention_k_eq_v=1; it must be true or false"),
        ({"use_bidirectional_attention": "all"}, r"use_bidirectional_attention='all'; supported here: None, 'vision'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_scaling=.*; supported here: None"),
        ({"vocab_size_per_layer_input": 90}, r"vocab_size_per_layer_input=90; supported here: 101"),
        ({"num_kv_shared_layers": 6}, r"num_kv_shared_layers=6; it must be a whole number from 0 to 5"),
        ({"num_kv_shared_layers": 4}, r"num_kv_shared_layers=4, which leaves no layer with keys and values for some"),
        ({"per_layer_config": []}, r"per_layer_config=\[\]; supported here: one head_dim and one"),
        ({"per_layer_config": {"2": {"head_dim": 24}}}, r"per_layer_config=.*supported here: one head_dim and one"),
        (
            {"per_layer_config": {key: {"head_dim": 24, "num_attention_heads": 1} for key in "245"}},
            r"per_layer_config=.*see everything \(2, 4, 5\), and nothing else",
        ),
        (
            {"per_layer_config": {key: {"head_dim": 24, "num_key_value_heads": 4} for key in "245"}},
            r"num_attention_heads=6 is not a multiple of num_key_value_heads=4, which",
        ),
        (
            {"per_layer_config": None, "attention_k_eq_v": True, "num_global_key_value_heads": 4},
            r"num_attention_heads=6 is not a multiple of num_global_key_value_heads=4, which",
        ),
        ({"sliding_window": 0}, r"sliding_window=0; it must be a whole number"),
        ({"layer_types": ["chunked_attention"] * 6}, r"layer_types=\['chunked_attention'"),
        ({"text_config": None}, r"text_config=None; it must be an object"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_hf(HF | fields)


def test_the_language_model_of_one_that_sees(tmp_path: Path) -> None:
    """Its tensors have other names, and what it does not need is left alone: the eye, keys of layers that share."""
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
    }  # fmt: skip
    whole = Gemma4Config(text_config=HF, vision_config=vision, audio_config=None)
    reference = random_weights(Gemma4ForConditionalGeneration(whole))
    for index, of_layer in enumerate(reference.model.language_model.layers):
        of_layer.layer_scalar.fill_(0.5 + index / 4)
    reference.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    unused = {f"model.language_model.layers.5.self_attn.{name}.weight": np.ones(3) for name in ("k_proj", "k_norm")}
    save_file(files | unused, tmp_path / "model.safetensors")

    check_language_model(reference, tmp_path, "model.language_model.", unused)
