"""A model as an nnx module: the same arrays, trained by optax."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from trtllm_jax import load_model
from trtllm_jax.functional.nnx import CausalLM

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 16))


@pytest.fixture
def module(tiny_llama: Path) -> CausalLM:
    return CausalLM(*load_model(tiny_llama, dtype="float32"))


def test_it_computes_what_the_model_computes_from_the_same_arrays(tiny_llama: Path) -> None:
    model, params = load_model(tiny_llama, dtype="float32")
    module = CausalLM(model, params)
    np.testing.assert_array_equal(module(TOKENS), model(params, TOKENS))
    np.testing.assert_array_equal(module.logprobs(TOKENS), model.logprobs(params, TOKENS))
    assert jax.tree.structure(module.params) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(module.params), jax.tree.leaves(params), strict=True):
        assert ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()


def test_split_and_merge_keep_the_arrays(module: CausalLM) -> None:
    definition, state = nnx.split(module, nnx.Param)
    merged = nnx.merge(definition, state)
    assert merged.params["layers"][1]["down"] is module.params["layers"][1]["down"]
    doubled = nnx.merge(definition, jax.tree.map(lambda leaf: 2 * leaf, state))
    np.testing.assert_array_equal(doubled.params["norm"], 2 * module.params["norm"])


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_old_arrays_alone(module: CausalLM) -> None:
    before = module.params
    copies = jax.tree.map(np.array, before)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module: CausalLM, optimizer: nnx.Optimizer[CausalLM]) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda module: -module.logprobs(TOKENS).mean())(module)
        optimizer.update(module, gradients)
        return loss

    losses = [float(step(module, optimizer)) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    model = module.model
    np.testing.assert_allclose(-model.logprobs(before, TOKENS).mean(), losses[0], rtol=1e-5)
    assert -model.logprobs(module.params, TOKENS).mean() < losses[-1]
    jax.tree.map(np.testing.assert_array_equal, before, copies)
