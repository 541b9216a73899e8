"""The forward pass without an engine: shapes, derivatives, memory, devices. The model suite compares its numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trtllm_jax import load_model
from trtllm_jax.functional import model as functional_model
from trtllm_jax.functional import research
from trtllm_jax.functional.model import Model

Loaded = tuple[Model, Any]
VOCAB = 258
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 24))
LENGTHS = np.array([24, 5, 1, 17])


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Loaded:
    return load_model(tiny_llama, dtype="float32")


def auto_mesh(**axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def assert_close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Leaf by leaf, relative to the largest value of the leaf."""
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


@pytest.mark.slow
def test_any_leading_axes(loaded: Loaded) -> None:
    model, params = loaded
    forward = jax.jit(model)
    batch = forward(params, TOKENS)
    assert batch.shape == (4, 24, VOCAB)
    assert batch.dtype == jnp.float32
    assert_close(model(params, TOKENS[0]), batch[0])
    assert_close(forward(params, TOKENS.reshape(2, 2, 24), LENGTHS.reshape(2, 2)), batch.reshape(2, 2, 24, VOCAB))
    assert_close(jax.jit(jax.vmap(model, in_axes=(None, 0)))(params, TOKENS), batch)


def test_later_tokens_and_padding_change_nothing_before_them(loaded: Loaded) -> None:
    model, params = loaded
    padded = np.where(np.arange(24) < LENGTHS[:, None], TOKENS, -1)
    with_padding, without = jax.jit(model)(params, padded, LENGTHS), jax.jit(model)(params, TOKENS)
    for row, length in enumerate(LENGTHS):
        assert_close(with_padding[row, :length], without[row, :length])


def test_logprobs_are_those_of_the_softmax(loaded: Loaded) -> None:
    model, params = loaded
    scores = np.asarray(jax.nn.log_softmax(jax.jit(model)(params, TOKENS)), np.float64)
    logprobs = jax.jit(model.logprobs)
    found = logprobs(params, TOKENS, LENGTHS)
    assert found.shape == TOKENS.shape
    for row, length in enumerate(LENGTHS):
        own = [scores[row, i - 1, TOKENS[row, i]] for i in range(1, length)]
        np.testing.assert_allclose(found[row], [0, *own, *[0] * (24 - length)], rtol=1e-5, atol=1e-5)
    assert_close(logprobs(params, TOKENS[0]), found[0])
    assert logprobs(params, TOKENS[:, :1]).tolist() == [[0.0]] * 4


def test_no_token_has_no_logprob(loaded: Loaded) -> None:
    """What `generate_fn` pads with counts for nothing, also without lengths; an id beyond the vocabulary shows."""
    model, params = loaded
    padded = np.where(np.arange(24) < LENGTHS[:, None], TOKENS, -1)
    logprobs = jax.jit(model.logprobs)
    assert_close(logprobs(params, padded), logprobs(params, TOKENS, LENGTHS))
    assert np.isnan(logprobs(params, np.array([5, VOCAB, 7]))).tolist() == [False, True, False]


def loss(model: Model, params: Any, tokens: jax.Array, remat: bool = False) -> jax.Array:
    return -model.logprobs(params, tokens, LENGTHS[: len(tokens)], remat=remat).mean()


@pytest.mark.parametrize("logits_at_once", [1, 4 * 5 * VOCAB, 10**9])
@pytest.mark.slow
def test_parts_of_the_logits_change_nothing(
    loaded: Loaded, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = loaded
    expected = jax.jit(jax.grad(lambda p: -_by_softmax(model, p).mean()))(params)
    monkeypatch.setattr(functional_model, "LOGITS_AT_ONCE", logits_at_once)
    assert_close(jax.jit(jax.grad(partial(loss, model)))(params, TOKENS), expected)


def _by_softmax(model: Model, params: Any) -> jax.Array:
    scores = jax.nn.log_softmax(model(params, TOKENS))[:, :-1]
    own = jnp.take_along_axis(scores, TOKENS[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(jnp.where(np.arange(1, 24) < LENGTHS[:, None], own, 0), ((0, 0), (1, 0)))


def temporary_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    found: int = jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    return found


def test_logprobs_need_less_memory_than_all_logits(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = loaded
    monkeypatch.setattr(functional_model, "LOGITS_AT_ONCE", 8 * VOCAB)
    tokens = np.zeros((8, 256), np.int32)
    logits_bytes = tokens.size * VOCAB * 4
    head = partial(model.logprobs, {**params, "layers": ()})  # the layers' own memory is another matter
    gradient = jax.grad(lambda x: model.logprobs({**params, "layers": (), "norm": x}, tokens).sum())
    assert temporary_bytes(head, tokens) < logits_bytes
    assert temporary_bytes(gradient, params["norm"]) < logits_bytes


@pytest.mark.slow
def test_remat_keeps_less_for_the_same_gradients(loaded: Loaded) -> None:
    """What is kept of each token: little more than the stream, before each layer and after the last."""
    model, params = loaded
    keep, again = (partial(loss, model, tokens=TOKENS, remat=remat) for remat in (False, True))
    assert_close(jax.jit(jax.grad(again))(params), jax.jit(jax.grad(keep))(params))

    def kept(function: Callable[..., Any]) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(function, p)[1], params))
        return sum(leaf.size for leaf in leaves if leaf.ndim and leaf.shape[0] == TOKENS.size)

    stream = TOKENS.size * params["embed"].shape[1]
    assert kept(again) < 1.5 * (len(params["layers"]) + 1) * stream
    assert kept(keep) > 4 * kept(again)


@pytest.mark.slow
def test_forward_mode_and_second_derivatives(loaded: Loaded) -> None:
    model, params = loaded
    score = partial(loss, model, tokens=TOKENS[:, :6])
    direction = jax.tree.map(lambda leaf: jnp.sign(leaf), params)
    along = jax.jit(jax.grad(lambda p: jax.jvp(score, (p,), (direction,))[1]))(params)
    step = 1e-3

    def moved(by: float) -> Any:
        return jax.tree.map(lambda leaf, sign: leaf + by * sign, params, direction)

    gradient = jax.jit(jax.grad(score))
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * step), gradient(moved(step)), gradient(moved(-step)))
    flat, expected = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (along, differences)
    )
    assert np.linalg.norm(flat - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.slow
def test_gradients_of_bfloat16_weights(loaded: Loaded) -> None:
    """Near those of float32, and of the weights' dtype."""
    model, params = loaded
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    gradient = jax.jit(jax.grad(partial(loss, model)))
    found, expected = gradient(narrow, TOKENS), gradient(wide, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < 0.1 * np.linalg.norm(theirs)


@pytest.mark.multi_device(4)
def test_data_and_tensor_parallel_on_our_mesh(tiny_llama: Path, loaded: Loaded) -> None:
    model, params = loaded
    mesh = auto_mesh(data=2, tp=2)
    _, split = load_model(tiny_llama, dtype="float32", mesh=mesh)
    assert split["layers"][0]["qkv"].sharding.spec[0] == "tp"
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
    assert_close(jax.jit(model)(split, tokens), jax.jit(model)(params, TOKENS))
    gradients = jax.jit(jax.grad(partial(loss, model)))(split, tokens)
    assert gradients["layers"][0]["qkv"].sharding.spec[0] == "tp"
    assert_close(gradients, jax.jit(jax.grad(partial(loss, model)))(params, TOKENS))


@pytest.mark.multi_device(3)
def test_sizes_that_a_mesh_does_not_divide_are_padded(tiny_llama: Path, loaded: Loaded) -> None:
    model, params = loaded
    _, split = load_model(tiny_llama, dtype="float32", mesh=auto_mesh(tp=3))
    assert split["layers"][0]["qkv"].shape[0] == 3
    assert_close(jax.jit(model)(split, TOKENS), jax.jit(model)(params, TOKENS))


@pytest.mark.multi_device(2)
def test_a_mesh_and_shardings_of_ones_own(loaded: Loaded) -> None:
    """Every array split along its last axis and every token row by itself, as sharded training does."""
    model, params = loaded
    mesh = auto_mesh(everything=2)
    last = jax.tree.map(lambda leaf: NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "everything")), params)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("everything")))
    gradients = jax.jit(jax.grad(partial(loss, model)), out_shardings=last)(jax.device_put(params, last), tokens)
    assert_close(gradients, jax.jit(jax.grad(partial(loss, model)))(params, TOKENS))


@pytest.mark.multi_device(2)
def test_explicit_axes_are_refused(tiny_llama: Path, loaded: Loaded) -> None:
    model, params = loaded
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"explicit axes, .*'tp': 2.*AxisType.Auto"):
        jax.jit(model)(jax.device_put(params, NamedSharding(mesh, P())), TOKENS)
    with pytest.raises(ValueError, match=r"load_model.mesh = .*AxisType.Auto"):
        load_model(tiny_llama, mesh=mesh)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, r"load_model.dtype = 'int8' is invalid"),
        ({"load_format": "pickle"}, r"load_model.load_format = 'pickle' is invalid"),
        ({"attention": "flash"}, r"load_model.attention = 'flash' is invalid"),
        ({"mesh": "x"}, r"load_model.mesh = .* must be a Mesh with an axis named 'tp'"),
        ({"mesh": 2}, r"load_model.mesh = 2 must be a Mesh"),
    ],
)
def test_arguments_that_are_wrong(tiny_llama: Path, arguments: dict[str, Any], message: str) -> None:
    if arguments.get("mesh") == "x":
        arguments = {"mesh": auto_mesh(x=1)}
    with pytest.raises(ValueError, match=message):
        load_model(tiny_llama, **arguments)


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (np.zeros((2, 0), int), None, r"shape \(2, 0\)"),
        (3, None, r"shape \(\); want \[..., tokens\]"),
        (np.zeros((2, 3)), None, r"dtype float32; want integers"),
        (np.zeros((2, 3), int), [3], r"lengths are int32\[1\] for tokens \[2, 3\]; want integers \[2\]"),
        (np.zeros((2, 3), int), [3.0, 2.0], r"lengths are float32\[2\]"),
    ],
)
def test_shapes_that_are_wrong(loaded: Loaded, tokens: Any, lengths: Any, message: str) -> None:
    model, params = loaded
    lengths = None if lengths is None else np.asarray(lengths)
    for function in (model, model.logprobs):
        with pytest.raises(ValueError, match=message):
            function(params, tokens, lengths)


def test_what_is_known_of_the_checkpoint(loaded: Loaded) -> None:
    model, params = loaded
    assert model.end_ids == {256}
    assert model.tokenizer.decode(model.tokenizer("ab")["input_ids"]) == "ab"
    assert hash(model) == hash(Model(model.module, model.config, model.end_ids))
    with pytest.raises(ValueError, match="not loaded from a checkpoint"):
        _ = Model(model.module, model.config).tokenizer
    assert params["embed"].dtype == jnp.float32


def test_random_weights_need_a_configuration_only(tiny_llama: Path, tmp_path: Path, loaded: Loaded) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    _, params = load_model(tmp_path, load_format="dummy", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, loaded[1])


def test_scores_are_those_of_the_softmax(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = loaded
    logits = np.asarray(model(params, TOKENS)).reshape(-1, VOCAB)
    rng = np.random.default_rng(1)
    places = np.array([0, 5, 23, 24, 50, 95, 5, 7])
    targets = rng.integers(0, VOCAB, places.size)
    targets[[0, 3]] = logits[places[[0, 3]]].argmax(axis=-1)
    expected = np.asarray(jax.nn.log_softmax(logits[places], axis=-1))[np.arange(places.size), targets]
    for at_once in (functional_model.LOGITS_AT_ONCE, 3 * VOCAB, 1):  # of a part, whole and divided unevenly
        monkeypatch.setattr(functional_model, "LOGITS_AT_ONCE", at_once)
        found = jax.jit(lambda *arguments: model.score(*arguments))(params, TOKENS, places, targets)
        assert_close(found.logprobs, expected)
        assert found.likeliest.tolist() == (logits[places].argmax(axis=-1) == targets).tolist()
    with pytest.raises(ValueError, match=r"places are \[2\] and targets \[1\]"):
        model.score(params, TOKENS, np.arange(2), np.arange(1))


def test_a_model_without_weights_computes_with_others(loaded: Loaded, tiny_llama: Path) -> None:
    model, params = loaded
    assert_close(research.open_model(tiny_llama)(params, TOKENS), model(params, TOKENS))
