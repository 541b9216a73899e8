"""Llama with int8 projections computes what the weights that they stand for do, everywhere."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig

from checkpoints.table import Params, leaf_of
from pallas_kernels.weights import QuantizedWeight, quantize_int8
from trtllm_jax.models import llama

from . import int8_llama
from .int8_llama import INPUTS
from .paged import PagedModel, relative_error
from .suite import CHUNKS, LONG, ONE_BY_ONE, SHORT
from .tiny import TinyModel

CONFIG = LlamaConfig(
    vocab_size=101, hidden_size=48, intermediate_size=90, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, head_dim=8, max_position_embeddings=64, mlp_bias=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(CONFIG, tmp_path_factory.mktemp("int8"), int8_llama)


def dequantized(params: Params) -> Params:
    return jax.tree.map(
        lambda leaf: leaf.dequantized(jnp.dtype(jnp.float32)) if isinstance(leaf, QuantizedWeight) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight),
    )


def test_loading_quantises_what_the_table_says(quantized: TinyModel) -> None:
    """An array where it says nothing; the scales have the axes of the outputs."""
    plain = PagedModel(replace(quantized.model, module=llama), quantized.model.files.tensors).params
    params = quantized.split().params
    assert isinstance(params["embed"], jax.Array)
    for path, inputs in INPUTS.items():
        found, array = (leaf_of(tree, path.replace("{i}", "1")) for tree in (params, plain))
        expected = quantize_int8(array, inputs)
        assert found.scales.shape == array.shape[: array.ndim - inputs]
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.scales, expected.scales)
    assert quantized.model.weight_dtype(params) == jnp.float32


def test_logits_are_those_of_the_weights_that_were_kept(quantized: TinyModel) -> None:
    """Not those of the weights before: 8 bits of random weights are off by a few thousandths a layer."""
    params = quantized.split().params
    prompt = np.array(quantized.prompt(LONG))
    run = jax.jit(quantized.model)
    found, expected = run(params, prompt), run(dequantized(params), prompt)
    assert relative_error(np.asarray(found), np.asarray(expected)) < 1e-5
    assert 1e-4 < relative_error(np.asarray(found), quantized.expected_logits(prompt.tolist())) < 0.1


@pytest.mark.parametrize("steps", [CHUNKS, ONE_BY_ONE], ids=["chunks", "one by one"])
def test_logits_over_pages_are_those_without(quantized: TinyModel, steps: list) -> None:
    prompts = [quantized.prompt(LONG), quantized.prompt(SHORT)]
    params = quantized.split().params
    for prompt, logits in zip(prompts, quantized.split().logits(prompts, steps), strict=True):
        expected = jax.jit(quantized.model)(dequantized(params), np.array(prompt))
        assert relative_error(logits, np.asarray(expected)) < 1e-5


@pytest.mark.multi_device(4)
def test_scales_are_split_as_the_outputs_are(quantized: TinyModel) -> None:
    """Where the inputs are split, in `o` and `down`, each device has all scales."""
    prompts = [quantized.prompt(LONG), quantized.prompt(SHORT)]
    layer = quantized.split(4).params["layers"][0]
    for name in ("qkv", "o", "gate_up", "down"):
        weight = layer[name]
        outputs = weight.scales.ndim
        assert tuple(weight.scales.sharding.spec) == tuple(weight.values.sharding.spec)[:outputs]
    assert "tp" in layer["qkv"].scales.sharding.spec
    for ours, expected in zip(
        quantized.split(4).logits(prompts, CHUNKS), quantized.split().logits(prompts, CHUNKS), strict=True
    ):
        assert relative_error(ours, expected) < 1e-5
