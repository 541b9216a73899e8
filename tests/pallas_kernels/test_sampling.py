from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import AbstractMesh, AxisType
from scipy import stats

from pallas_kernels import sampling
from pallas_kernels.sampling import pallas_triton
from pallas_kernels.sampling.noise import gumbel, threefry

IMPLEMENTATIONS = ("xla", "triton", pytest.param("gpu", marks=pytest.mark.gpu))
"""The last is what runs on a GPU by itself: the compiled kernels, which are interpreted elsewhere."""

KINDS = ("normal", "ties", "holes", "masked", "large", "equal", "banned")
ROWS, MANY = 64, 256
"""Rows of all calls: with few shapes the interpreted kernels compile seldom."""


def make_logits(kind: str, vocab: int, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, vocab)) * 3
    holes = rng.random((rows, vocab)) < 0.5
    holes[:, 0] = False
    if kind == "ties":
        logits = logits.round()
    elif kind == "holes":
        logits[holes] = -np.inf
    elif kind == "masked":
        logits[holes] = np.finfo(np.float32).min
    elif kind == "large":
        logits *= 1e30
    elif kind == "equal":
        logits[:] = -0.0
    elif kind == "banned":
        logits[:] = -np.inf
    return logits.astype(np.float32)


def make_wishes(
    temperature: object = 1.0, top_k: object = 0, top_p: object = 1.0, min_p: object = 0.0, rows: int = ROWS
) -> dict[str, np.ndarray]:
    def filled(value: object, dtype: type) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype), (rows,)))

    rng = np.random.default_rng(rows)
    return {
        "temperature": filled(temperature, np.float32),
        "top_k": filled(top_k, np.int32),
        "top_p": filled(top_p, np.float32),
        "min_p": filled(min_p, np.float32),
        "seed": rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
        "position": rng.integers(0, 2**31, rows).astype(np.int32),
    }


@cache
def compiled(implementation: str) -> object:
    chosen = None if implementation == "gpu" else implementation
    return jax.jit(partial(sampling.sample, implementation=chosen))


def draw(logits: np.ndarray | jax.Array, wishes: dict[str, np.ndarray], implementation: str) -> np.ndarray:
    tokens = compiled(implementation)(logits, **wishes)
    assert tokens.dtype == jnp.int32
    assert tokens.shape == logits.shape[:1]
    return np.asarray(tokens)


def exact_noise(seed: np.ndarray, position: np.ndarray, vocab: int) -> np.ndarray:
    """Gumbel noise in float64, a token a word: token j has word j // 1024 % 2 of the counter without that bit."""
    tokens = np.arange(vocab)
    counter = np.broadcast_to((tokens & ~1024).astype(np.uint32), (len(seed), vocab))
    zeros = np.zeros(len(seed), np.uint32)
    key = threefry((seed[:, 0], seed[:, 1]), (position.astype(np.uint32), zeros))
    words = threefry((key[0][:, None], key[1][:, None]), (counter, np.zeros_like(counter)))
    word = np.where(tokens & 1024, words[1], words[0])
    uniform = np.minimum(((word >> 1) + 0.5) / 2**31, 1 - 2.0**-24)
    return -np.log(-np.log1p(-uniform))


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """What the cuts leave of one row, by sorting in float64."""
    scores = logits.astype(np.float64) / temperature
    ranked = np.sort(scores)[::-1]
    kept = scores >= ranked[min(top_k, len(scores)) - 1] if top_k else np.ones(len(scores), bool)
    weights = np.where(kept, np.exp(scores - ranked[0]), 0)
    if top_p < 1:
        heavy = np.sort(weights)[::-1]
        last = min(np.searchsorted(heavy.cumsum(), top_p * weights.sum()), len(heavy) - 1)
        kept &= weights >= heavy[last] * (1 - 1e-6)
    return kept & (weights >= min_p * (1 - 1e-6))


def possible_draws(logits: np.ndarray, wishes: dict[str, np.ndarray], rounding: float = 1e-5) -> Iterator[np.ndarray]:
    """For each row the tokens that an exact draw may yield when top_p is off by `rounding`: nearly always one."""
    noise = exact_noise(wishes["seed"], wishes["position"], logits.shape[1])
    for row, scores in enumerate(logits):
        temperature, top_k, top_p, min_p = (
            wishes[name][row].item() for name in ("temperature", "top_k", "top_p", "min_p")
        )
        if temperature == 0:
            yield np.array([scores.argmax()])
            continue
        tokens = []
        for border in [top_p] if top_p == 1 else [max(top_p - rounding, 0), min(top_p + rounding, 1 - 1e-12)]:
            kept = kept_tokens(scores, temperature, top_k, border, min_p)
            noisy = np.where(kept, scores.astype(np.float64) / temperature + noise[row], -np.inf)
            tokens.append(np.flatnonzero(noisy >= noisy.max() - 1e-4))
        yield np.unique(np.concatenate(tokens))


def mixed_wishes(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows that ask for everything, each alone and together, greedy rows among them."""
    rng = np.random.default_rng(seed)
    choices = {
        "temperature": [0, 0.3, 0.8, 1, 2, 100],
        "top_k": [0, 0, 1, 7, 50, 2**31 - 1],
        "top_p": [1, 1, 1e-9, 0.3, 0.9, 0.99],
        "min_p": [0, 0, 0.02, 0.5],
    }
    return make_wishes(**{name: rng.choice(values, ROWS) for name, values in choices.items()})


# ---- the noise ----


def test_the_generator_is_threefry() -> None:
    rng = np.random.default_rng(0)
    key, counters = rng.integers(0, 2**32, 2, dtype=np.uint32), rng.integers(0, 2**32, (2, 100), dtype=np.uint32)
    words = threefry((key[0], key[1]), (counters[0], counters[1]), rounds=20)
    np.testing.assert_array_equal(np.concatenate(words), threefry_2x32((key[0], key[1]), counters.ravel()))
    # The authors' known answers for 13 rounds.
    for bits, answer in ((0, (0x9D1C5EC6, 0x8BD50731)), (2**32 - 1, (0xFD36D048, 0x2D17272C))):
        words = threefry((jnp.uint32(bits), jnp.uint32(bits)), (jnp.uint32(bits), jnp.uint32(bits)))
        assert (int(words[0]), int(words[1])) == answer


def test_noise_is_gumbel_and_differs_between_tokens_positions_and_seeds() -> None:
    seed = np.array([[1, 2], [1, 2], [1, 3], [2, 2]], np.uint32)
    noise = np.asarray(gumbel(jnp.asarray(seed), jnp.array([5, 6, 5, 5]), 50_000))
    exact = exact_noise(seed, np.array([5, 6, 5, 5]), 50_000)
    np.testing.assert_allclose(noise, exact, rtol=1e-4, atol=1e-4)
    assert stats.kstest(noise.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.02
    for lag in (1, 2, 512, 1024, 2048):
        assert abs(np.corrcoef(noise[0, :-lag], noise[0, lag:])[0, 1]) < 0.02


# ---- the draw ----


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [257, 4099])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_draws_what_an_exact_draw_yields(kind: str, vocab: int, implementation: str) -> None:
    logits, wishes = make_logits(kind, vocab), mixed_wishes()
    tokens = draw(logits, wishes, implementation)
    if kind == "banned":
        assert not tokens.any()
        return
    possible = list(possible_draws(logits, wishes))
    assert sum(len(choice) > 1 for choice in possible) <= 3
    assert [row for row, choice in enumerate(possible) if tokens[row] not in choice] == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_are_no_numbers_change_no_other_row(implementation: str) -> None:
    logits, wishes = make_logits("normal", 257), mixed_wishes()
    expected = draw(logits, wishes, implementation)
    broken = np.arange(ROWS) % 3 == 1
    logits[broken] = np.resize([np.nan, np.inf, -np.inf, 1.0], (broken.sum(), 257))
    logits[1] = np.nan
    tokens = draw(logits, wishes, implementation)
    np.testing.assert_array_equal(tokens[~broken], expected[~broken])
    assert ((tokens >= 0) & (tokens < 257)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wish", [{"top_k": 9}, {"top_k": 40, "top_p": 0.5}, {"min_p": 0.975}])
@pytest.mark.slow
def test_flat_rows_draw_all_of_what_is_kept_and_nothing_else(wish: dict[str, float], implementation: str) -> None:
    logits = make_logits("normal", 257, rows=1).repeat(MANY, 0)
    settings = {"temperature": 100.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | wish
    kept = np.flatnonzero(kept_tokens(logits[0], **settings))
    assert 2 < len(kept) < 30
    assert set(draw(logits, make_wishes(**settings, rows=MANY), implementation)) == set(kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.slow
def test_top_k_tells_neighbouring_floats_apart(implementation: str) -> None:
    order = np.random.default_rng(0).permutation(257)
    logits = (-8 - np.spacing(np.float32(8)) * order).astype(np.float32)
    logits[order == 0] = 0
    tokens = draw(logits[None].repeat(MANY, 0), make_wishes(1e6, top_k=9, rows=MANY), implementation)
    assert set(tokens) == set(np.flatnonzero(order < 9))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.slow
def test_draws_have_the_distribution_of_the_softmax_of_what_is_kept(implementation: str) -> None:
    logits = make_logits("normal", 257, rows=1).repeat(MANY, 0)
    probabilities = np.where(kept_tokens(logits[0], 2.0, 20, 0.9, 0.0), np.exp(logits[0].astype(np.float64) / 2), 0)
    wishes = make_wishes(2.0, 20, 0.9, rows=MANY)
    wishes["seed"][:] = 11, 12
    counts = np.zeros(257)
    for start in range(0, 8 * MANY, MANY):
        wishes["position"] = np.arange(start, start + MANY, dtype=np.int32)
        counts += np.bincount(draw(logits, wishes, implementation), minlength=257)
    possible = probabilities > 0
    expected = probabilities[possible] / probabilities.sum() * counts.sum()
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "nearly_greedy",
    [{"temperature": t} for t in (0, 1e-6, 1e-30, 2e-38)] + [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0}, {"min_p": 1}],
)
def test_every_setting_ends_in_the_likeliest_token(nearly_greedy: dict[str, float], implementation: str) -> None:
    logits = make_logits("normal", 257)
    for others in ({}, {"top_p": 0.9, "top_k": 8, "min_p": 0.1}):
        tokens = draw(logits, make_wishes(**(others | nearly_greedy)), implementation)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("choose", ["greedy", *IMPLEMENTATIONS])
def test_a_greedy_row_takes_the_lowest_of_the_likeliest_ids(choose: str) -> None:
    rng = np.random.default_rng(0)
    logits = make_logits("normal", 4099)
    for row in logits:
        row[rng.integers(0, 256) + 256 * rng.choice(15, 3, replace=False)] = 20  # what one lane of a kernel may see
    tokens = (
        sampling.greedy(jnp.asarray(logits)) if choose == "greedy" else draw(logits, make_wishes(temperature=0), choose)
    )
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_the_same_program_have_a_likeliest_token(temperature: float) -> None:
    """As after a soft cap: the product that ends it may be contracted with a difference, and rounded once less."""
    hidden = make_logits("normal", 257)
    wishes = jax.tree.map(jnp.asarray, make_wishes(temperature, top_k=1))

    @jax.jit
    def capped_draw(hidden: jax.Array) -> jax.Array:
        return sampling.sample(5.0 * jnp.tanh(hidden / 5.0), **wishes, implementation="xla")

    np.testing.assert_array_equal(capped_draw(hidden), hidden.argmax(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_hot_row_draws_anything_but_what_is_banned(implementation: str) -> None:
    logits = make_logits("holes", 257, rows=1).repeat(MANY, 0)
    allowed = np.flatnonzero(logits[0] > -np.inf)
    tokens = draw(logits, make_wishes(temperature=1e38, rows=MANY), implementation)
    assert set(tokens) <= set(allowed)
    assert len(set(tokens)) > 0.75 * len(allowed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_draw_depends_on_its_own_row_only(implementation: str) -> None:
    logits, wishes = make_logits("ties", 257), mixed_wishes(1)
    together = draw(logits, wishes, implementation)
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = draw(logits[order], {name: value[order] for name, value in wishes.items()}, implementation)
    np.testing.assert_array_equal(shuffled, together[order])
    # Other neighbours, and as often as the batch has rows: nothing but the row's own wishes decides.
    for row in (3, 11):
        alone = {name: value[[row] * ROWS] for name, value in wishes.items()}
        np.testing.assert_array_equal(draw(logits[[row] * ROWS], alone, implementation), together[row])


# ---- the kernel ----


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.slow
def test_neither_tuning_nor_a_narrower_dtype_changes_a_token(interpret: bool) -> None:
    logits, wishes = jnp.asarray(make_logits("normal", 4099)).astype(jnp.bfloat16), mixed_wishes(2)
    tuning = pallas_triton.Tuning(top_k_ways=32, top_p_ways=16, tile=256, programs=1)
    expected = draw(np.asarray(logits.astype(jnp.float32)), wishes, "xla")
    np.testing.assert_array_equal(draw(logits, wishes, "xla"), expected)
    tokens = pallas_triton.sample(logits, **wishes, tuning=tuning, interpret=interpret)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 128_256), (64, 128_256), (256, 128_256), (64, 257), (3, 151_669)])
def test_the_kernels_lower_for_a_gpu(rows: int, vocab: int, dtype: jnp.dtype) -> None:
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    mesh = AbstractMesh((1,), ("x",), abstract_device=device, axis_types=(AxisType.Auto,))
    wishes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in make_wishes(rows=rows).items()}
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(pallas_triton.sample).trace(jax.ShapeDtypeStruct((rows, vocab), dtype), **wishes)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    # The largest logit, four kinds of passes (two after a pass of their own kind), the draw: equal ones only once.
    assert lowered.count("stablehlo.custom_call") == 6
