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
from pallas_kernels.norm import Norm
from pallas_kernels.weights import quantize_int8
from trtllm_jax.nn import layers
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.dtypes import activation_dtype
from trtllm_jax.nn.execution import DEFAULT_EXECUTION, Execution
from trtllm_jax.nn.layers import Normed, Residual

VOCAB, EMBED, MLP = 22, 12, 20
DEVICES = 4

multi_device = pytest.mark.multi_device(DEVICES)


def random(*shape: int, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def split(function: Callable[..., jax.Array], *arguments: tuple[np.ndarray, str]) -> np.ndarray:
    """`function` on devices that hold their parts of arrays given with their logical axes; the result is replicated."""
    arrays, axes = zip(*arguments, strict=True)
    rules = sharding.ShardingRules(sharding.make_mesh(DEVICES))
    specs = tuple(rules.spec(each.split()) for each in axes)
    mapped = jax.shard_map(function, mesh=rules.mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return np.asarray(jax.jit(mapped)(*arrays))


def to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))


def padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    return np.pad(array, [(0, size - array.shape[i] if i == axis else 0) for i in range(array.ndim)])


TOKENS = np.array([3, 0, 21, 3, 11, 20])


def batch_of(tokens: np.ndarray) -> Batch:
    """A batch of which only the tokens matter."""
    return Batch(tokens, tokens, tokens, dtype=jnp.dtype(jnp.float32))


BATCH = batch_of(np.zeros(1, np.int32))


def test_an_id_outside_the_vocabulary_has_an_embedding_of_zeros() -> None:
    rows = layers.embed(batch_of(np.array([-1, VOCAB])), jnp.asarray(random(VOCAB, EMBED))).total
    np.testing.assert_array_equal(rows, np.zeros((2, EMBED)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embedding_rows(dtype: npt.DTypeLike) -> None:
    table = random(VOCAB, EMBED, dtype=dtype)
    rows = layers.embed(batch_of(TOKENS), jnp.asarray(table)).total
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(rows, np.float32), table[TOKENS].astype(np.float32))


def test_embeddings_of_a_batch_stand_in_the_place_of_tokens() -> None:
    """As they are, while those of the table are scaled."""
    table, own = random(VOCAB, EMBED), random(len(TOKENS), EMBED)
    embedded = TOKENS == 3
    batch = batch_of(TOKENS).replace(embeddings=own, embedded=embedded)
    rows = layers.embed(batch, jnp.asarray(table), scale=1.5).total
    np.testing.assert_allclose(rows, np.where(embedded[:, None], own, 1.5 * table[TOKENS]), rtol=1e-6)


def test_a_scale_is_rounded_as_the_embeddings_are() -> None:
    """Gemma's factor of 48 channels is 6.9282 exactly, and 6.9375 in bfloat16."""
    batch = batch_of(TOKENS).replace(dtype=jnp.dtype(jnp.bfloat16))
    rows = layers.embed(batch, jnp.ones((VOCAB, 48), jnp.bfloat16), scale=48**0.5).total
    np.testing.assert_array_equal(np.asarray(rows, np.float32), 6.9375)


@multi_device
def test_embedding_split_by_vocabulary() -> None:
    table = random(VOCAB, EMBED)
    rows = split(lambda table: layers.embed(batch_of(TOKENS), table).total, (padded(table, 0, 24), "vocab embed"))
    np.testing.assert_array_equal(rows, table[TOKENS])


def test_activations_on_a_cpu_are_float32() -> None:
    assert activation_dtype(jnp.dtype(jnp.bfloat16)) == jnp.float32


def linear(x: Any, weight: Any, *contracted: str, bias: np.ndarray | None = None) -> jax.Array:
    """`layers.linear` of arrays of numpy's."""
    x, weight, added = jax.tree.map(jnp.asarray, (x, weight, bias))
    return layers.linear(x, weight, BATCH, *contracted, bias=added)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_linear_contracts_the_last_axes(rows: int, bias: bool) -> None:
    x, weight = random(rows, 3, 2, 4), random(5, 2, 3, 2, 4)
    added = random(5, 2) if bias else None
    out = linear(x, weight, "kv_heads", "group", "head_dim", bias=added)
    expected = torch.einsum("thgd,onhgd->ton", to_torch(x), to_torch(weight))
    if added is not None:
        expected += to_torch(added)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("activation", [jnp.float32, jnp.bfloat16])
def test_linear_with_narrow_weights_accumulates_in_float32(rows: int, activation: npt.DTypeLike) -> None:
    """Each product of two bfloat16 numbers is exact in float32; a sum in bfloat16 would be wrong in the third digit."""
    x, weight = random(rows, 512, dtype=jnp.bfloat16), random(7, 512, dtype=jnp.bfloat16)
    out = linear(jnp.asarray(x, activation), weight, "embed")
    assert out.dtype == activation
    assert out.shape == (rows, 7)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    tolerance = 2**-8 if activation == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=tolerance, atol=1e-4)


@multi_device
def test_linear_split_along_its_contraction_adds_the_bias_once() -> None:
    x, weight, bias = random(3, MLP), random(EMBED, MLP), random(EMBED)
    out = split(
        lambda x, weight, bias: layers.linear(x, weight, BATCH, "mlp", bias=bias),
        (x, "tokens mlp"),
        (weight, "embed mlp"),
        (bias, "embed"),
    )
    np.testing.assert_allclose(out, x @ weight.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("summed", [True, False])
def test_int8_weights_are_weights(summed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every product; what they stand for is theirs to say."""
    monkeypatch.setattr(layers.matmul, "adds_residual", lambda *_: summed)
    x, stream, weight, bias = random(3, 2, 4), random(3, 5), random(5, 2, 4), random(5)
    quantized = quantize_int8(jnp.asarray(weight), inputs=2)
    kept = np.asarray(quantized.dequantized(jnp.dtype(jnp.float32)), np.float64)
    expected = np.einsum("tgd,ogd->to", x, kept)
    out = linear(x, quantized, "group", "head_dim", bias=bias)
    np.testing.assert_allclose(out, expected + bias, rtol=1e-5, atol=1e-5)
    added = layers.add_linear(Residual(jnp.asarray(stream)), jnp.asarray(x), quantized, BATCH, "group", "head_dim")
    np.testing.assert_allclose(added.total, stream + expected, rtol=1e-5, atol=1e-5)


EPS = 1e-5


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`x` as torch normalises it."""
    return torch.nn.functional.rms_norm(to_torch(x), (x.shape[-1],), to_torch(weight), eps=EPS).numpy()


def test_linear_of_rows_that_are_to_be_normalised() -> None:
    x, weight, gamma = random(3, EMBED), random(4, 5, EMBED), random(EMBED)
    residual, rows = layers.normalised(Residual(jnp.asarray(x)), Norm(gamma, EPS), BATCH)
    out = linear(rows, weight, "embed")
    np.testing.assert_allclose(out, np.einsum("te,abe->tab", normed(x, gamma), weight), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(residual.total, x)


def test_normalising_a_stream_sums_it() -> None:
    x, added, weight, gamma = random(3, EMBED), random(4, EMBED)[:3], random(5, EMBED), random(EMBED)
    residual, rows = layers.normalised(Residual(*map(jnp.asarray, (x, added))), Norm(gamma, EPS), BATCH)
    np.testing.assert_array_equal(residual.total, x + added)
    out = linear(rows, weight, "embed")
    np.testing.assert_allclose(out, normed(x + added, gamma) @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("summed", [True, False])
def test_a_product_is_added_to_the_stream(summed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.matmul, "adds_residual", lambda *_: summed)
    stream = Residual(jnp.asarray(random(3, EMBED)), jnp.asarray(random(4, EMBED)[:3]))
    x, weight = jnp.asarray(random(3, MLP)), jnp.asarray(random(EMBED, MLP))
    out = layers.add_linear(stream, x, weight, BATCH, "mlp")
    assert (out.added is None) == summed
    np.testing.assert_allclose(out.total, stream.total + x @ weight.T, rtol=1e-5, atol=1e-5)


@multi_device
@pytest.mark.parametrize("biased", [False, True])
def test_a_split_product_is_added_to_the_stream_once(biased: bool) -> None:
    x, weight, bias, stream = random(3, MLP), random(EMBED, MLP), random(EMBED), random(3, EMBED)
    out = split(
        lambda x, weight, bias, stream: (
            layers.add_linear(Residual(stream), x, weight, BATCH, "mlp", bias=bias if biased else None).total
        ),
        (x, "tokens mlp"),
        (weight, "embed mlp"),
        (bias, "embed"),
        (stream, "tokens embed"),
    )
    np.testing.assert_allclose(out, x @ weight.T + bias * biased + stream, rtol=1e-5, atol=1e-5)


def mlp_of_torch(x: Any, gate_up: Any, down: Any, gate_up_bias: Any, down_bias: Any) -> np.ndarray:
    x, gate_up, down, gate_up_bias, down_bias = map(to_torch, (x, gate_up, down, gate_up_bias, down_bias))
    gate, up = (torch.nn.functional.linear(x, gate_up[i], gate_up_bias[i]) for i in range(2))
    return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down, down_bias).numpy()


GAMMA = random(EMBED)


def block(x: Any, gate_up: Any, down: Any, gate_up_bias: Any = None, down_bias: Any = None) -> jax.Array:
    """x after the normalised MLP."""
    x, gate_up, down, gate_up_bias, down_bias = jax.tree.map(jnp.asarray, (x, gate_up, down, gate_up_bias, down_bias))
    residual, rows = layers.normalised(Residual(x), Norm(jnp.asarray(GAMMA), EPS), BATCH)
    hidden = layers.gated(rows, gate_up, BATCH, bias=gate_up_bias)
    return layers.add_linear(residual, hidden, down, BATCH, "mlp", bias=down_bias).total


def block_of_torch(x: np.ndarray, *weights: Any) -> np.ndarray:
    return x + mlp_of_torch(normed(x, GAMMA), *weights)


def test_gated_mlp() -> None:
    weights = random(2, MLP, EMBED), random(EMBED, MLP), random(2, MLP), random(EMBED)
    x = random(5, EMBED)
    np.testing.assert_allclose(block(x, *weights), block_of_torch(x, *weights), rtol=1e-4, atol=1e-4)
    expected = block_of_torch(x, *weights[:2], np.zeros((2, MLP)), np.zeros(EMBED))
    np.testing.assert_allclose(block(x, *weights[:2]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_a_gate_may_be_another(biased: bool) -> None:
    x, gate_up, bias = random(5, EMBED), random(2, MLP, EMBED), random(2, MLP) * biased
    weights = jax.tree.map(jnp.asarray, (gate_up, bias if biased else None))
    out = layers.gated(Normed(jnp.asarray(x), None), weights[0], BATCH, activation="gelu_tanh", bias=weights[1])
    gate, up = (torch.nn.functional.linear(*map(to_torch, (x, gate_up[i], bias[i]))) for i in range(2))
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_attention_of_an_encoder_sees_both_ways_and_no_padding() -> None:
    """Against torch, sequence by sequence."""
    lengths, width, heads, group, dim = (7, 4), 7, 2, 3, 8
    qkv = random(2 * width, heads, group + 2, dim)
    batch = Batch.of_sequences(jnp.zeros((2, width), jnp.int32), jnp.array(lengths), Execution(xla_only=True))
    out, cache = layers.attention(jnp.asarray(qkv), batch, None, rotation=None, scale=0.3, causal=False)
    assert cache is None
    for index, length in enumerate(lengths):
        own = to_torch(qkv.reshape(2, width, heads, group + 2, dim)[index, :length])
        q, k, v = own[:, :, :group], own[:, :, group : group + 1], own[:, :, group + 1 :]
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k.expand_as(q), v.expand_as(q)))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).permute(2, 0, 1, 3)
        found = np.asarray(out).reshape(2, width, heads, group, dim)[index, :length]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_without_pages_states_its_sequences() -> None:
    with pytest.raises(ValueError, match=r"Batch\.of_sequences"):
        layers.attention(jnp.zeros((1, 1, 3, 4)), BATCH, None, rotation=None, scale=1.0)


@multi_device
@pytest.mark.parametrize("biased", [False, True])
def test_gated_mlp_split_by_channels(biased: bool) -> None:
    gate_up, down = random(2, 18, EMBED), random(EMBED, 18)
    gate_up_bias, down_bias = random(2, 18) * biased, random(EMBED) * biased
    x = random(5, EMBED)
    out = split(
        lambda x, gate_up, down, *biases: block(x, gate_up, down, *(biases if biased else ())),
        (x, "tokens embed"),
        (padded(gate_up, 1, 20), "two mlp embed"),
        (padded(down, 1, 20), "embed mlp"),
        (padded(gate_up_bias, 1, 20), "two mlp"),
        (down_bias, "embed"),
    )
    expected = block_of_torch(x, gate_up, down, gate_up_bias, down_bias)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_logits_are_float32_and_leave_padding_out() -> None:
    x, table = random(5, EMBED), random(VOCAB, EMBED, dtype=jnp.bfloat16)
    scores = layers.logits(Normed(jnp.asarray(x), None), jnp.asarray(padded(table, 0, 24)), VOCAB, DEFAULT_EXECUTION)
    assert scores.dtype == jnp.float32
    rounded = x.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_allclose(scores, rounded @ table.astype(np.float32).T, rtol=1e-5, atol=1e-5)


@multi_device
def test_logits_split_by_vocabulary_are_whole_on_every_device() -> None:
    x, table = random(5, EMBED), random(VOCAB, EMBED)
    scores = split(
        lambda x, table: layers.logits(Normed(x, Norm(jnp.asarray(GAMMA), EPS)), table, VOCAB, DEFAULT_EXECUTION),
        (x, "tokens embed"),
        (padded(table, 0, 24), "vocab embed"),
    )
    np.testing.assert_allclose(scores, normed(x, GAMMA) @ table.T, rtol=1e-5, atol=1e-5)
