"""Layer functions against torch, whole and split over fake devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from jax.sharding import PartitionSpec as P

import sharding
from trtllm_jax import layers

VOCAB, EMBED, MLP = 22, 12, 20
DEVICES = 4

multi_device = pytest.mark.multi_device(DEVICES)


def random(*shape: int, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def split(function: Callable[..., jax.Array], *arguments: tuple[np.ndarray, str]) -> np.ndarray:
    """`function` on devices that hold their parts of arrays given with their logical axes; the result is replicated."""
    arrays, axes = zip(*arguments, strict=True)
    specs = tuple(sharding.spec_of(each.split()) for each in axes)
    mapped = jax.shard_map(function, mesh=sharding.make_mesh(DEVICES), in_specs=specs, out_specs=P(), check_vma=False)
    return np.asarray(jax.jit(mapped)(*arrays))


def to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))


def padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    return np.pad(array, [(0, size - array.shape[i] if i == axis else 0) for i in range(array.ndim)])


TOKENS = np.array([3, 0, 21, 3, 11, 20])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embedding_rows(dtype: npt.DTypeLike) -> None:
    table = random(VOCAB, EMBED, dtype=dtype)
    rows = layers.embed(TOKENS, table)
    assert rows.dtype == layers.activation_dtype(table.dtype)
    np.testing.assert_array_equal(np.asarray(rows, np.float32), table[TOKENS].astype(np.float32))


@multi_device
def test_embedding_split_by_vocabulary() -> None:
    table = random(VOCAB, EMBED)
    rows = split(lambda table: layers.embed(TOKENS, table), (padded(table, 0, 24), "vocab embed"))
    np.testing.assert_array_equal(rows, table[TOKENS])


def test_activations_on_a_cpu_are_float32() -> None:
    assert layers.activation_dtype(jnp.dtype(jnp.bfloat16)) == jnp.float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_linear_contracts_the_last_axes(rows: int, bias: bool) -> None:
    x, weight = random(rows, 3, 2, 4), random(5, 2, 3, 2, 4)
    added = random(5, 2) if bias else None
    out = layers.linear(x, weight, "kv_heads", "group", "head_dim", bias=added)
    expected = torch.einsum("thgd,onhgd->ton", to_torch(x), to_torch(weight))
    if added is not None:
        expected += to_torch(added)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("activation", [jnp.float32, jnp.bfloat16])
def test_linear_with_narrow_weights_accumulates_in_float32(rows: int, activation: npt.DTypeLike) -> None:
    """Each product of two bfloat16 numbers is exact in float32; a sum in bfloat16 would be wrong in the third digit."""
    x, weight = random(rows, 512, dtype=jnp.bfloat16), random(7, 512, dtype=jnp.bfloat16)
    out = layers.linear(jnp.asarray(x, activation), weight, "embed")
    assert out.dtype == activation
    assert out.shape == (rows, 7)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    tolerance = 2**-8 if activation == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=tolerance, atol=1e-4)


@multi_device
def test_linear_split_along_its_contraction_adds_the_bias_once() -> None:
    x, weight, bias = random(3, MLP), random(EMBED, MLP), random(EMBED)
    out = split(
        lambda x, weight, bias: layers.linear(x, weight, "mlp", bias=bias),
        (x, "tokens mlp"),
        (weight, "embed mlp"),
        (bias, "embed"),
    )
    np.testing.assert_allclose(out, x @ weight.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_rms_norm(scale: float) -> None:
    x, weight = scale * random(4, 3, EMBED), random(EMBED)
    expected = torch.nn.functional.rms_norm(to_torch(x), (EMBED,), to_torch(weight), eps=1e-5)
    np.testing.assert_allclose(layers.rms_norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_narrow_input_is_computed_in_float32() -> None:
    x, weight = random(4, 300, dtype=jnp.bfloat16), random(300, dtype=jnp.bfloat16)
    out = layers.rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5)
    assert out.dtype == jnp.bfloat16
    exact = torch.nn.functional.rms_norm(to_torch(x), (300,), to_torch(weight), eps=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=2**-8)


def mlp_of_torch(x: Any, gate_up: Any, down: Any, gate_up_bias: Any, down_bias: Any) -> np.ndarray:
    x, gate_up, down, gate_up_bias, down_bias = map(to_torch, (x, gate_up, down, gate_up_bias, down_bias))
    gate, up = (torch.nn.functional.linear(x, gate_up[i], gate_up_bias[i]) for i in range(2))
    return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down, down_bias).numpy()


def test_gated_mlp() -> None:
    weights = random(2, MLP, EMBED), random(EMBED, MLP), random(2, MLP), random(EMBED)
    x = random(5, EMBED)
    np.testing.assert_allclose(layers.gated_mlp(x, *weights), mlp_of_torch(x, *weights), rtol=1e-4, atol=1e-4)
    zeros = np.zeros((2, MLP)), np.zeros(EMBED)
    expected = mlp_of_torch(x, *weights[:2], *zeros)
    np.testing.assert_allclose(layers.gated_mlp(x, *weights[:2]), expected, rtol=1e-4, atol=1e-4)


@multi_device
def test_gated_mlp_split_by_channels() -> None:
    gate_up, down, gate_up_bias, down_bias = weights = (
        random(2, 18, EMBED), random(EMBED, 18), random(2, 18), random(EMBED)
    )  # fmt: skip
    x = random(5, EMBED)
    out = split(
        layers.gated_mlp,
        (x, "tokens embed"),
        (padded(gate_up, 1, 20), "two mlp embed"),
        (padded(down, 1, 20), "embed mlp"),
        (padded(gate_up_bias, 1, 20), "two mlp"),
        (down_bias, "embed"),
    )
    np.testing.assert_allclose(out, mlp_of_torch(x, *weights), rtol=1e-4, atol=1e-4)


def test_logits_are_float32_and_leave_padding_out() -> None:
    x, table = random(5, EMBED), random(VOCAB, EMBED, dtype=jnp.bfloat16)
    scores = layers.logits(x, padded(table, 0, 24), VOCAB)
    assert scores.dtype == jnp.float32
    rounded = x.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_allclose(scores, rounded @ table.astype(np.float32).T, rtol=1e-5, atol=1e-5)


@multi_device
def test_logits_split_by_vocabulary_are_whole_on_every_device() -> None:
    x, table = random(5, EMBED), random(VOCAB, EMBED)
    scores = split(
        lambda x, table: layers.logits(x, table, VOCAB), (x, "tokens embed"), (padded(table, 0, 24), "vocab embed")
    )
    np.testing.assert_allclose(scores, x @ table.T, rtol=1e-5, atol=1e-5)
