"""Rotary embedding against transformers' own, in every scaled variant and in both spellings of a configuration."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma4TextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pallas_kernels.attention import rotate as apply_rotation
from trtllm_jax.nn import rope as rope_module
from trtllm_jax.nn.rope import Rope, context_stretch, rotary_channels


@functools.partial(jax.jit, static_argnums=1)
def rotate(x: jax.Array, rope: Rope, positions: jax.Array, lengths: jax.Array) -> jax.Array:
    return apply_rotation(x, rope_module.rotation(rope, positions, lengths))


HEAD_DIM = 64
TRAINED = 256

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0}
LONG = {"original_max_position_embeddings": 8192}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + pair / 40 for pair in range(HEAD_DIM // 2)],
    "long_factor": [1 + pair / 4 for pair in range(HEAD_DIM // 2)],
    "original_max_position_embeddings": TRAINED,
}
SCALINGS: Mapping[str, Mapping[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "old name": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3 | LONG | {"factor": 8.0},
    "llama3.2": LLAMA3 | LONG | {"factor": 32.0},
    "llama3 narrow": LLAMA3 | LONG | {"factor": 2.0, "high_freq_factor": 1.5},
    "llama3 without original length": LLAMA3 | {"factor": 8.0},
    "yarn": YARN | LONG,
    "yarn short": YARN | {"original_max_position_embeddings": 16},
    "yarn without original length": YARN,
    "yarn that stretches nothing": YARN | LONG | {"factor": 1.0},
    "yarn attention_factor": YARN | LONG | {"attention_factor": 0.8},
    "yarn betas": YARN | LONG | {"beta_fast": 20, "beta_slow": 2},
    "yarn mscale": YARN | LONG | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn mscale alone": YARN | LONG | {"mscale": 0.7},
    "yarn untruncated": YARN | LONG | {"truncate": False},
    "longrope": LONGROPE | {"factor": 8.0},
    "longrope attention_factor": LONGROPE | {"attention_factor": 1.7},
    "longrope that stretches nothing": LONGROPE,
    "longrope without original length": {**LONGROPE, "original_max_position_embeddings": None, "factor": 4.0},
    "longrope by the ratio of lengths": LONGROPE | {"original_max_position_embeddings": 64},
}


def config_of(scaling: Mapping[str, Any] | None, **fields: Any) -> dict[str, Any]:
    """A config.json in the spelling before transformers 5; a fresh one, because transformers writes into it."""
    return {
        "hidden_size": 2 * HEAD_DIM,
        "num_attention_heads": 2,
        "head_dim": HEAD_DIM,
        "rope_theta": 50000.0,
        "max_position_embeddings": TRAINED,
        "rope_scaling": scaling and {key: value for key, value in scaling.items() if value is not None},
        **fields,
    }


def check_frequencies(config: Mapping[str, Any], expected: LlamaRotaryEmbedding) -> None:
    rope = Rope.from_config(config, HEAD_DIM)
    np.testing.assert_allclose(rope.frequencies, expected.inv_freq.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(expected.attention_scaling, rel=1e-9)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_frequencies_and_attention_factor(scaling: Mapping[str, Any] | None, spelling: str) -> None:
    config = config_of(scaling)
    theirs = LlamaConfig(**config_of(scaling))
    if spelling == "rope_parameters":
        config = theirs.to_dict()
        assert not {"rope_scaling", "rope_theta"} & config.keys()
    check_frequencies(config, LlamaRotaryEmbedding(theirs))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"rope_theta": None}, id="no base"),
        pytest.param(
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 888.0},
            },
            id="both spellings",
        ),
        pytest.param(
            {"original_max_position_embeddings": 700, "rope_scaling": SCALINGS["yarn"]}, id="original length outside"
        ),
    ],
)
def test_unusual_places(fields: dict[str, Any]) -> None:
    given = {key: value for key, value in config_of(None, **fields).items() if value is not None}
    check_frequencies(given, LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(given))))


def test_frequency_factors_divide_the_frequencies() -> None:
    """GGUF files carry llama3's scaling as one divisor a pair."""
    plain, scaled = (LlamaRotaryEmbedding(LlamaConfig(**config_of(SCALINGS[k]))) for k in ("default", "llama3"))
    factors = (plain.inv_freq / scaled.inv_freq).tolist()
    check_frequencies(config_of({"rope_type": "frequency_factors", "factors": factors}), scaled)


@pytest.mark.parametrize("fields", [{}, {"partial_rotary_factor": 0.3}, {"partial_rotary_factor": 0.25, "factor": 2.0}])
def test_proportional_leaves_the_last_pairs_alone(fields: dict[str, float]) -> None:
    """Gemma 4's, which transformers has for layers of one type."""
    record = {"rope_type": "proportional", "rope_theta": 1e6, **fields}
    theirs = Gemma4TextConfig(
        head_dim=HEAD_DIM, num_hidden_layers=1, global_head_dim=HEAD_DIM, rope_parameters={"full_attention": record}
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["proportional"](theirs, layer_type="full_attention")
    rope = Rope.from_config({"rope_parameters": record}, HEAD_DIM)
    np.testing.assert_allclose(rope.frequencies, expected.numpy(), rtol=2e-6)
    assert rope.attention_factor == attention_factor
    turning = int(fields.get("partial_rotary_factor", 1.0) * HEAD_DIM / 2)
    assert np.count_nonzero(rope.frequencies) == turning


@pytest.mark.parametrize("part", [0, 1.5])
def test_proportional_rotates_a_part_of_a_head(part: float) -> None:
    with pytest.raises(ValueError, match=rf"partial_rotary_factor={part}; it must be"):
        Rope.from_config(config_of({"rope_type": "proportional", "partial_rotary_factor": part}), HEAD_DIM)


def test_unknown_type_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"rope_type 'longest'.*supported: default, linear, dynamic, llama3, yarn, longrope"
    ):
        Rope.from_config(config_of({"rope_type": "longest", "factor": 2.0}), HEAD_DIM)


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({"rope_type": "linear"}, "factor=None"),
        ({"rope_type": "dynamic", "factor": "2"}, "factor='2'"),
        ({"rope_type": "yarn", "factor": True}, "factor=True"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor=None"),
        ({**LONGROPE, "factor": -1}, "factor=-1"),
    ],
)
def test_missing_numbers_are_named(scaling: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"rope_scaling.*{scaling['rope_type']}.* {field}; it must be a number"):
        Rope.from_config(config_of(scaling), HEAD_DIM)


@pytest.mark.parametrize(
    ("kind", "stretch"), [("default", 1.0), ("linear", 2.5), ("dynamic", 3.0), ("llama3", 1.0), ("yarn", 1.0)]
)
def test_only_linear_and_dynamic_scaling_stretch_the_stated_length(kind: str, stretch: float) -> None:
    """The others state the stretched length, as TensorRT-LLM assumes too."""
    assert context_stretch(config_of(SCALINGS[kind])) == stretch


def heads(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(tokens, 3, 2, HEAD_DIM)).astype(np.float32)


def rotated_by_transformers(x: np.ndarray, kind: str, positions: np.ndarray) -> np.ndarray:
    embedding = LlamaRotaryEmbedding(LlamaConfig(**config_of(SCALINGS[kind])))
    flat = torch.from_numpy(x).reshape(1, len(x), -1, HEAD_DIM).transpose(1, 2)
    cosine, sine = embedding(flat, torch.from_numpy(positions)[None])
    turned, _ = apply_rotary_pos_emb(flat, flat, cosine, sine)
    return turned.transpose(1, 2).reshape(x.shape).numpy()


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn", "yarn attention_factor"])
def test_rotation(kind: str) -> None:
    positions = np.random.default_rng(1).integers(0, 4000, 37)
    x = heads(len(positions))
    ours = rotate(x, Rope.from_config(config_of(SCALINGS[kind]), HEAD_DIM), positions, positions + 1)
    np.testing.assert_allclose(ours, rotated_by_transformers(x, kind, positions), atol=2e-3)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("length", [TRAINED // 2, TRAINED, TRAINED + 1, 3 * TRAINED])
def test_rotation_of_a_prompt_depends_on_its_length(length: int, kind: str) -> None:
    positions = np.arange(length)
    x = heads(length)
    rope = Rope.from_config(config_of(SCALINGS[kind]), HEAD_DIM)
    ours = rotate(x, rope, positions, np.full(length, length))
    np.testing.assert_allclose(ours, rotated_by_transformers(x, kind, positions), atol=5e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotation_of_generated_tokens_depends_on_the_length_at_their_time(kind: str) -> None:
    lengths = np.array([TRAINED - 3, TRAINED, TRAINED + 1, 2 * TRAINED, 3 * TRAINED])
    x = heads(len(lengths))
    rope = Rope.from_config(config_of(SCALINGS[kind]), HEAD_DIM)
    ours = rotate(x, rope, lengths - 1, lengths)
    for token in range(len(lengths)):
        alone = slice(token, token + 1)
        expected = rotated_by_transformers(x[alone], kind, lengths[alone] - 1)
        np.testing.assert_allclose(ours[alone], expected, atol=5e-4)


def test_narrow_input_is_rotated_in_float32() -> None:
    x = heads(20).astype(jnp.bfloat16)
    rope = Rope.from_config(config_of(None), HEAD_DIM)
    positions = np.arange(500, 520)
    ours = rotate(x, rope, positions, positions + 1)
    assert ours.dtype == jnp.bfloat16
    exact = rotate(x.astype(np.float32), rope, positions, positions + 1)
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("fields", "channels"),
    [
        ({}, HEAD_DIM),
        ({"partial_rotary_factor": 0.25}, 16),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
            32,
        ),
    ],
)
def test_how_many_channels_are_rotated(fields: dict[str, Any], channels: int) -> None:
    assert rotary_channels(fields, HEAD_DIM) == channels


def test_an_architecture_may_rotate_less_where_nothing_is_said() -> None:
    assert rotary_channels({}, HEAD_DIM, 0.25) == 16
    assert rotary_channels({"partial_rotary_factor": 1.0}, HEAD_DIM, 0.25) == HEAD_DIM


@pytest.mark.parametrize("factor", [1.5, 1e-3, -1, "0.5", True])
def test_other_parts_of_a_head_are_refused(factor: Any) -> None:
    with pytest.raises(ValueError, match=r"partial_rotary_factor="):
        rotary_channels({"partial_rotary_factor": factor}, HEAD_DIM)


FULL, LOCAL = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "full", "local"),
    [
        ({}, {"rope_theta": 1e6}, {"rope_theta": 1e4}),
        (
            {"rope_theta": 5e5, "local_base": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0},
            {"rope_theta": 2e4},
        ),
        (
            {
                "rope_theta": 7.0,
                "rope_parameters": {FULL: {"rope_theta": 3e5, "rope_type": "default"}, LOCAL: {"rope_theta": None}},
            },
            {"rope_theta": 3e5, "rope_type": "default"},
            {"rope_theta": 1e4},
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {FULL: {"rope_theta": 3e5, "rope_type": "default"}, LOCAL: {"rope_theta": 2e4}},
            },
            {"rope_theta": 3e5, "type": "linear", "factor": 2.0},
            {"rope_theta": 2e4},
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 4e5}},
            {"rope_theta": 4e5, "type": "linear", "factor": 2.0},
            {"rope_theta": 1e4},
        ),
    ],
)
def test_layers_of_each_type_have_a_rope_of_their_own(
    config: dict[str, Any], full: dict[str, Any], local: dict[str, Any]
) -> None:
    read = [
        rope_module.of_layer_type(config, FULL, ("rope_theta", 1e6)),
        rope_module.of_layer_type(config, LOCAL, ("local_base", 1e4), scaled=False),
    ]
    assert [(one["rope_parameters"], one["rope_scaling"]) for one in read] == [(full, None), (local, None)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]; it must have an object for each type of layers"),
        ({"rope_parameters": {FULL: 1.0}}, "it must have an object for each type of layers, such as 'full_attention'"),
        ({"rope_parameters": {"rope_type": "default"}}, "it must have an object for each type of layers"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'; it must be an object"),
    ],
)
def test_records_of_another_kind_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_module.of_layer_type(fields, FULL, ("rope_theta", 1e6))
