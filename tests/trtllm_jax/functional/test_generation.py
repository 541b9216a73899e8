"""Generation as one function against transformers, `LLM`, the forward pass and the probabilities that it draws from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.devices import Platform
from trtllm_jax import SamplingParams, generate_fn, load_model
from trtllm_jax.functional.generation import Generate
from trtllm_jax.functional.model import Model
from trtllm_jax.functional.prefill import PAGE_SIZE
from trtllm_jax.nn.execution import Execution

from ..tiny_engine import tiny_engine

Loaded = tuple[Model, Any]

WIDTH, NEW = 40, 24
"""Both more than half a page, so that prompts and answers cross pages."""

LENGTHS = np.array([7, 40, 0, 1, 33])
PROMPTS = np.random.default_rng(0).integers(0, 256, (5, WIDTH))
assert WIDTH > PAGE_SIZE


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Loaded:
    return load_model(tiny_llama, dtype="float32")


@pytest.fixture(scope="module")
def generate(loaded: Loaded) -> Generate:
    """To the limit, no id ends a row."""
    return jax.jit(generate_fn(loaded[0], NEW, end_ids=()))


@pytest.fixture(scope="module")
def logprobs_after(loaded: Loaded) -> Callable[[int, Sequence[int]], np.ndarray]:
    """What the forward pass says of the tokens that follow a row's prompt."""
    score = jax.jit(loaded[0].logprobs)

    def after(row: int, tokens: Sequence[int]) -> np.ndarray:
        whole = np.zeros(WIDTH + NEW, int)
        end = LENGTHS[row] + len(tokens)
        whole[:end] = [*prompt_of(row), *tokens]
        return np.asarray(score(loaded[1], whole))[LENGTHS[row] : end]

    return after


def prompt_of(row: int) -> list[int]:
    ids: list[int] = PROMPTS[row, : LENGTHS[row]].tolist()
    return ids


def test_greedy_tokens_are_those_of_transformers_and_of_llm(
    tiny_llama: Path,
    loaded: Loaded,
    generate: Generate,
    greedy_by_transformers: Callable[[list[int], int], list[int]],
    logprobs_after: Callable[[int, Sequence[int]], np.ndarray],
) -> None:
    """And the engine reports, for tokens that it draws, the log-probabilities that the forward pass finds."""
    tokens = generate(loaded[1], PROMPTS, LENGTHS).tokens
    rows = np.flatnonzero(LENGTHS)
    with tiny_engine(tiny_llama) as llm:
        asked = [prompt_of(row) for row in rows]
        greedy = llm.generate(asked, SamplingParams(max_tokens=NEW, ignore_eos=True))
        drawn = llm.generate(
            asked, SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=1.5, top_k=50, seed=1, logprobs=1)
        )
    for row, by_greed, by_chance in zip(rows, greedy, drawn, strict=True):
        assert tokens[row].tolist() == by_greed.outputs[0].token_ids == greedy_by_transformers(prompt_of(row), NEW)
        (answer,) = by_chance.outputs
        engine = [at[token].logprob for at, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        np.testing.assert_allclose(engine, logprobs_after(row, answer.token_ids), rtol=1e-5, atol=1e-5)


def test_logprobs_are_those_of_the_forward_pass(
    loaded: Loaded, generate: Generate, logprobs_after: Callable[[int, Sequence[int]], np.ndarray]
) -> None:
    out = generate(loaded[1], PROMPTS, LENGTHS, jax.random.key(3), temperature=1.3, top_p=0.9)
    for row in np.flatnonzero(LENGTHS):
        expected = logprobs_after(row, out.tokens[row].tolist())
        np.testing.assert_allclose(out.logprobs[row], expected, rtol=1e-5, atol=1e-5)


def test_an_empty_prompt_generates_nothing(loaded: Loaded, generate: Generate) -> None:
    out = generate(loaded[1], PROMPTS, LENGTHS)
    row = LENGTHS.tolist().index(0)
    assert out.tokens[row].tolist() == [-1] * NEW
    assert out.logprobs[row].tolist() == [0.0] * NEW


def test_padding_may_be_any_id(loaded: Loaded, generate: Generate) -> None:
    """One of which the model has no number, too: a weight of 0 times what is not finite would be NaN."""
    params = loaded[1] | {"embed": loaded[1]["embed"].at[257].set(np.nan)}
    padded = np.where(np.arange(WIDTH) < LENGTHS[:, None], PROMPTS, 257)
    assert "head" in params
    expected, found = generate(loaded[1], PROMPTS, LENGTHS), generate(params, padded, LENGTHS)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)


class Counted:
    """A model whose head, called once a token, counts how often it runs."""

    def __init__(self, model: Model, end_ids: set[int]) -> None:
        self.runs = 0
        module = ModuleType("counted")
        vars(module).update(vars(model.module))

        def head(*arguments: Any, **options: Any) -> jax.Array:
            jax.debug.callback(self._count)
            scores: jax.Array = model.module.head(*arguments, **options)
            return scores

        vars(module)["head"] = head
        self.model = Model(module, model.config, frozenset(end_ids))

    def _count(self) -> None:
        self.runs += 1


def test_a_row_ends_with_its_end_id_and_the_loop_with_the_last_row(loaded: Loaded, generate: Generate) -> None:
    model, params = loaded
    free = np.asarray(generate(params, PROMPTS, LENGTHS).tokens)
    rows = np.flatnonzero(LENGTHS)
    ends = {int(free[row, 2 + 3 * i]) for i, row in enumerate(rows)}
    counted = Counted(model, ends)
    out = jax.jit(generate_fn(counted.model, NEW, pad_id=7))(params, PROMPTS, LENGTHS)
    jax.block_until_ready(out)
    jax.effects_barrier()
    longest = 0
    for row in rows:
        length = 1 + next(i for i, token in enumerate(free[row]) if token in ends)
        longest = max(longest, length)
        assert out.tokens[row].tolist() == [*free[row, :length], *[7] * (NEW - length)]
        assert np.all(out.logprobs[row, :length] != 0)
        assert np.all(out.logprobs[row, length:] == 0)
    assert 2 < longest < NEW
    assert counted.runs == longest


KEY = jax.random.key(0)


@pytest.mark.slow
def test_draws_follow_the_probabilities(loaded: Loaded, generate: Generate) -> None:
    """First tokens of 5 rows, mapped over 200 keys: within five standard deviations of each token's expected count."""
    model, params = loaded
    temperature, top_p = 2.0, 0.5
    wishes = {"temperature": temperature, "top_p": top_p}
    keys = jax.random.split(jax.random.key(0), 200)
    rows = PROMPTS[:1].repeat(5, 0), np.full(5, 8)
    mapped = jax.vmap(partial(generate_fn(model, 2, end_ids=()), **wishes), in_axes=(None, None, None, 0))
    tokens = np.asarray(jax.jit(mapped)(params, *rows, keys).tokens)
    assert tokens[7].tolist() == generate(params, *rows, keys[7], **wishes).tokens[:, :2].tolist()

    logits = np.asarray(jax.jit(model)(params, PROMPTS[0])[7], np.float64)
    order = np.argsort(-logits)
    chances = np.exp(logits[order] / temperature)
    chances /= chances.sum()
    kept = 1 + np.argmax(np.cumsum(chances) >= top_p)
    assert kept > 3
    chances = chances[:kept] / chances[:kept].sum()
    drawn = tokens[:, :, 0].ravel()
    counts = np.array([(drawn == token).sum() for token in order[:kept]])
    assert counts.sum() == drawn.size
    assert np.all(np.abs(counts - chances * drawn.size) < 5 * np.sqrt(drawn.size * chances * (1 - chances)))


@pytest.mark.slow
def test_rows_have_wishes_of_their_own(loaded: Loaded, generate: Generate) -> None:
    params = loaded[1]
    key = jax.random.key(5)
    greedy = generate(params, PROMPTS, LENGTHS).tokens
    mixed = generate(params, PROMPTS, LENGTHS, key, temperature=jnp.array([0.0, 1.0, 1.0, 5.0, 5.0]), top_k=0)
    cut = generate(params, PROMPTS, LENGTHS, key, temperature=5.0, top_k=jnp.array([1, 1, 1, 0, 0]))
    assert mixed.tokens[0].tolist() == greedy[0].tolist()
    assert cut.tokens[:3].tolist() == greedy[:3].tolist()
    for row in (3, 4):
        assert mixed.tokens[row].tolist() == cut.tokens[row].tolist() != greedy[row].tolist()


def test_a_draw_depends_on_key_and_row_only(loaded: Loaded, generate: Generate) -> None:
    params, wishes = loaded[1], {"temperature": 1.5, "top_p": 0.95}
    key = jax.random.key(9)
    all_rows = np.asarray(generate(params, PROMPTS, LENGTHS, key, **wishes).tokens)
    programs = generate._cache_size()  # type: ignore[attr-defined]
    hotter = generate(params, PROMPTS, LENGTHS, key, **wishes | {"temperature": 3.0}).tokens
    assert hotter.tolist() != all_rows.tolist()
    assert generate._cache_size() == programs  # type: ignore[attr-defined]
    narrow = generate(params, PROMPTS[:1, :9], LENGTHS[:1], key, **wishes).tokens
    assert narrow[0].tolist() == all_rows[0].tolist()
    same_prompts = generate(params, PROMPTS[:1].repeat(5, 0), LENGTHS[:1].repeat(5), key, **wishes).tokens
    assert len({tuple(row.tolist()) for row in same_prompts}) == 5
    assert generate(params, PROMPTS, LENGTHS, jax.random.key(10), **wishes).tokens.tolist() != all_rows.tolist()


@pytest.mark.multi_device(4)
@pytest.mark.slow
def test_automatic_partitioning(tiny_llama: Path, loaded: Loaded, generate: Generate) -> None:
    mesh = jax.make_mesh((2, 2), ("data", "tp"), axis_types=(AxisType.Auto,) * 2)
    _, split = load_model(tiny_llama, dtype="float32", mesh=mesh)
    rows = NamedSharding(mesh, P("data"))
    prompts, lengths = jax.device_put((PROMPTS[:4], LENGTHS[:4]), rows)
    found = generate(split, prompts, lengths, KEY, temperature=1.2)
    expected = generate(loaded[1], PROMPTS[:4], LENGTHS[:4], KEY, temperature=1.2)
    assert found.tokens.tolist() == expected.tokens.tolist()


@pytest.mark.multi_device(4)
@pytest.mark.parametrize(("drawn", "end_ids"), [(False, ()), pytest.param(True, None, marks=pytest.mark.slow)])
def test_inside_a_shard_map_of_ones_own(
    drawn: bool, end_ids: tuple[int, ...] | None, tiny_llama: Path, loaded: Loaded
) -> None:
    """Rows over one axis, heads over the other: our collectives run over `tp`, and each half ends by itself."""
    mesh = jax.make_mesh((2, 2), ("data", "tp"), axis_types=(AxisType.Auto,) * 2)
    _, split = load_model(tiny_llama, dtype="float32", mesh=mesh)
    generate = generate_fn(loaded[0], NEW, end_ids=end_ids)
    mapped = jax.shard_map(
        generate,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda leaf: leaf.sharding.spec, split), P("data"), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,
    )
    key = KEY if drawn else None
    traced = jax.jit(mapped).trace(split, PROMPTS[:4], LENGTHS[:4], key)
    (equation,) = (one for one in traced.jaxpr.eqns if one.primitive.name == "shard_map")
    # jax 0.11.2 dies where it compiles a map that an array without elements enters, a captured constant too.
    assert all(entering.aval.size for entering in equation.invars)
    found = traced.lower().compile()(split, PROMPTS[:4], LENGTHS[:4], key).tokens
    # Every device numbers its rows from 0.
    halves = [jax.jit(generate)(loaded[1], PROMPTS[rows], LENGTHS[rows], key) for rows in (slice(2), slice(2, 4))]
    assert found.tolist() == [row for half in halves for row in half.tokens.tolist()]


def test_kernels_are_a_choice(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU takes them unless told otherwise; several devices do not."""
    model, params = loaded
    chosen = []
    module = ModuleType("spied")
    vars(module).update(vars(model.module))

    def head(config: Any, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
        chosen.append(execution.xla_only)
        scores: jax.Array = model.module.head(config, params, x, execution)
        return scores

    vars(module)["head"] = head
    spied = Model(module, model.config, execution=Execution(Platform("gpu")))
    for devices, asked, plain in [(1, None, False), (2, None, True), (1, False, True), (2, True, False)]:
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        generate = generate_fn(spied, 1, kernels=asked)
        chosen.clear()
        jax.eval_shape(generate, params, PROMPTS[:1])
        assert set(chosen) == {plain}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"temperature": 0.5},
            r"generate got temperature without a key: give a jax.random key, or leave temperature out",
        ),
        ({"key": KEY, "top_p": np.ones(3)}, r"top_p of shape \(3,\) for 5 rows; want a number or \[5\]"),
        ({"key": KEY, "top_k": 2.5}, r"top_k of dtype float32; want integers"),
        ({"lengths": [1, 2]}, r"lengths are int32\[2\] for tokens \[5, 40\]"),
        ({"prompts": PROMPTS[0]}, r"shape \(40,\); want \[rows, tokens\]"),
        ({"prompts": PROMPTS.repeat(6, 1)}, r"prompts of 240 tokens and max_new_tokens=24 exceed the model's 256"),
    ],
)
def test_arguments_that_are_wrong(loaded: Loaded, arguments: dict[str, Any], message: str) -> None:
    generate = generate_fn(loaded[0], NEW)
    arguments = {name: np.asarray(value) if name == "lengths" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        generate(loaded[1], **{"prompts": PROMPTS, **arguments})


@pytest.mark.parametrize("new", [0, 16.0, "16", True])
def test_at_least_one_token(new: Any, loaded: Loaded) -> None:
    with pytest.raises(ValueError, match=rf"generate_fn.max_new_tokens = {new!r}; it must be an integer of at least 1"):
        generate_fn(loaded[0], new)


@pytest.mark.parametrize("end_ids", [2, "2", [2.0], ["</s>"]])
def test_end_ids_are_ids(end_ids: Any, loaded: Loaded) -> None:
    with pytest.raises(ValueError, match=r"generate_fn.end_ids = .*; give a list of token ids"):
        generate_fn(loaded[0], 4, end_ids=end_ids)


def test_the_model_alone_is_wanted(loaded: Loaded) -> None:
    with pytest.raises(
        ValueError, match=r"generate_fn\.model is a tuple; give the Model that load_model returns first"
    ):
        generate_fn(loaded, 4)  # type: ignore[arg-type]
