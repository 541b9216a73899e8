from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trtllm_jax.engine import sampler
from trtllm_jax.engine.row_state import MAX_DEVICE_STOPS, Wishes

Cut = Callable[[jax.Array, jax.Array], jax.Array]

KEEP_TOP_K: Cut = jax.jit(sampler._keep_top_k)
KEEP_TOP_P: Cut = jax.jit(sampler._keep_top_p)
KEEP_MIN_P: Cut = jax.jit(sampler._keep_min_p)
LOGPROBS = jax.jit(sampler.logprobs, static_argnames="count")
SAMPLE = jax.jit(sampler.sample)

KINDS = ("normal", "ties", "holes", "large", "equal")


def make_logits(kind: str, rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, vocab)) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "holes":
        holes = rng.random((rows, vocab)) < 0.5
        holes[:, 0] = False
        logits[holes] = -np.inf
    elif kind == "large":
        logits *= 1e30
    elif kind == "equal":
        logits[:] = -0.0
    return logits.astype(np.float32)


def make_wishes(
    rows: int,
    temperature: object = 1.0,
    top_k: object = 0,
    top_p: object = 1.0,
    min_p: object = 0.0,
    seed: object = None,
) -> Wishes:
    def filled(value: object, dtype: type) -> jax.Array:
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (rows,)))

    seeds = np.arange(rows, dtype=np.uint64) if seed is None else np.broadcast_to(np.asarray(seed, np.uint64), (rows,))
    return Wishes(
        limit=filled(0, np.int32),
        stop_ids=jnp.full((rows, MAX_DEVICE_STOPS), -1, jnp.int32),
        temperature=filled(temperature, np.float32),
        top_k=filled(top_k, np.int32),
        top_p=filled(top_p, np.float32),
        min_p=filled(min_p, np.float32),
        seed=jnp.asarray(np.stack([seeds >> 32, seeds & 0xFFFFFFFF], axis=1).astype(np.uint32)),
    )


def draw(logits: np.ndarray, wishes: Wishes, positions: np.ndarray | int = 7) -> np.ndarray:
    rows = np.broadcast_to(np.asarray(positions, np.int32), logits.shape[:1])
    return np.asarray(SAMPLE(jnp.asarray(logits), wishes, jnp.asarray(rows)))


def softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    powers = np.exp(exact - exact.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# ---- the likeliest token ----


@pytest.mark.parametrize("vocab", [1, 2, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_lowest_of_the_likeliest_ids(kind: str, vocab: int) -> None:
    logits = make_logits(kind, 64, vocab)
    tokens = jax.jit(sampler.greedy)(logits)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_a_row_without_temperature_takes_its_likeliest_token_whatever_the_others_do() -> None:
    logits = make_logits("ties", 64, 50)
    cold = np.arange(64) % 2 == 0
    tokens = draw(logits, make_wishes(64, np.where(cold, 0.0, 5.0), top_k=9, top_p=0.9, min_p=0.01))
    np.testing.assert_array_equal(tokens[cold], logits.argmax(-1)[cold])
    assert (tokens[~cold] != logits.argmax(-1)[~cold]).any()


@pytest.mark.parametrize(
    "nearly_greedy",
    [{"temperature": t} for t in (1e-3, 1e-30, 2e-38, 1e-45)] + [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}],
)
@pytest.mark.parametrize("others", [{}, {"top_p": 0.9, "top_k": 8, "min_p": 0.1}])
def test_every_setting_ends_in_the_likeliest_token(nearly_greedy: dict[str, float], others: dict[str, float]) -> None:
    logits = make_logits("normal", 64, 50)
    np.testing.assert_array_equal(draw(logits, make_wishes(64, **(others | nearly_greedy))), logits.argmax(-1))


# ---- what the cuts keep ----


@pytest.mark.parametrize("vocab", [1, 33, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_keeps_the_k_largest_scores_and_what_equals_the_last(kind: str, vocab: int) -> None:
    rows = 32
    scores = make_logits(kind, rows, vocab)
    top_k = np.random.default_rng(1).integers(0, vocab + 3, rows).astype(np.int32)
    top_k[:4] = 0, 1, vocab, 2**31 - 1
    wanted = np.where(top_k > 0, np.minimum(top_k, vocab), vocab)
    thresholds = np.take_along_axis(np.sort(scores, axis=-1)[:, ::-1], wanted[:, None] - 1, axis=-1)
    np.testing.assert_array_equal(KEEP_TOP_K(scores, top_k), np.where(scores >= thresholds, scores, -np.inf))


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of the likeliest tokens that reaches top_p, and what is as likely as its last."""
    ranked = np.sort(probabilities)[::-1]
    last = min(np.searchsorted(ranked.cumsum(), top_p), ranked.size - 1)
    return probabilities >= ranked[last]


@pytest.mark.parametrize("vocab", [1, 33, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_top_p_keeps_the_smallest_set_that_reaches_it(kind: str, vocab: int) -> None:
    rows, rounding = 32, 2e-6
    scores = make_logits(kind, rows, vocab)
    top_p = np.random.default_rng(1).uniform(0, 1, rows).astype(np.float32)
    top_p[:4] = 1, 0.999, 1e-6, 0.5
    top_p[16:] = np.nextafter(np.float32(1), np.float32(0))  # what the rounded probabilities of many rows do not reach
    left = np.asarray(KEEP_TOP_P(scores, top_p))
    kept = left > -np.inf
    np.testing.assert_array_equal(left[kept], scores[kept])
    np.testing.assert_array_equal(left[0], scores[0])
    for row, probabilities in enumerate(softmax(scores)):
        assert kept[row][nucleus(probabilities, top_p[row] - rounding)].all()
        assert not kept[row][~nucleus(probabilities, top_p[row] + rounding)].any()


@pytest.mark.parametrize("kind", KINDS)
def test_min_p_keeps_what_is_so_likely_compared_with_the_likeliest(kind: str) -> None:
    rows = 64
    scores = make_logits(kind, rows, 33)
    min_p = np.random.default_rng(1).uniform(0, 1, rows).astype(np.float32)
    min_p[:2] = 0, 1
    left = np.asarray(KEEP_MIN_P(scores, min_p))
    kept, exact = left > -np.inf, scores.astype(np.float64)
    np.testing.assert_array_equal(left[kept], scores[kept])
    np.testing.assert_array_equal(left[0], scores[0])
    with np.errstate(divide="ignore"):
        floor = exact.max(-1, keepdims=True) + np.log(min_p, dtype=np.float64)[:, None]
    rounding = 1e-6 * (1 + np.abs(exact.max(-1, keepdims=True)))
    assert kept[(exact >= floor + rounding) & (exact > -np.inf)].all()
    assert not kept[exact < floor - rounding].any()
    assert kept[np.arange(rows), scores.argmax(-1)].all()


@pytest.mark.parametrize(
    ("cut", "value", "warper"),
    [(KEEP_TOP_K, np.int32(k), TopKLogitsWarper(k)) for k in (1, 7, 50, 99)]
    + [(KEEP_TOP_P, np.float32(p), TopPLogitsWarper(p)) for p in (0.1, 0.5, 0.95, 0.999)]
    + [(KEEP_MIN_P, np.float32(p), MinPLogitsWarper(p)) for p in (0.01, 0.3, 1.0)],
)
def test_cuts_keep_what_transformers_keeps(cut: Cut, value: np.generic, warper: Callable[..., torch.Tensor]) -> None:
    scores = make_logits("normal", 64, 50)
    np.testing.assert_array_equal(cut(scores, np.full(64, value)), warper(None, torch.from_numpy(scores)).numpy())


# ---- the draw ----


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.5, 0, 1.0, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.5, 0, 0.7, 0.0),
        (1.0, 0, 1.0, 0.3),
        (2.0, 5, 0.9, 0.0),
        (2.0, 7, 0.95, 0.25),
    ],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_have_the_distribution_that_transformers_draws_from(
    temperature: float, top_k: int, top_p: float, min_p: float, varied: str
) -> None:
    draws = 20_000
    logits = np.array([[2.0, 1.5, 1.0, 0.6, 0.0, -0.5, -1.0, -np.inf]], np.float32)
    scores = torch.from_numpy(logits)
    for wanted, warper in (
        (True, lambda: TemperatureLogitsWarper(temperature)),
        (top_k, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1, lambda: TopPLogitsWarper(top_p)),
        (min_p, lambda: MinPLogitsWarper(min_p)),
    ):
        scores = warper()(None, scores) if wanted else scores
    expected = torch.softmax(scores[0].double(), -1).numpy() * draws
    numbers = np.arange(draws)
    seeds, positions = (numbers, 5) if varied == "seed" else (2**63, numbers)
    wishes = make_wishes(draws, temperature, top_k, top_p, min_p, seeds)
    counts = np.bincount(draw(logits.repeat(draws, 0), wishes, positions), minlength=8)
    possible = expected > 0
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


def test_neighbouring_positions_and_seeds_draw_independently() -> None:
    side, vocab = 140, 5
    seeds, positions = np.divmod(np.arange(side * side), side)
    tokens = draw(np.zeros((side * side, vocab), np.float32), make_wishes(side * side, seed=seeds), positions)
    table = tokens.reshape(side, side)
    for first, second in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1])):
        pairs = np.zeros((vocab, vocab))
        np.add.at(pairs, (first.ravel(), second.ravel()), 1)
        assert stats.chi2_contingency(pairs).pvalue > 1e-3


def test_both_words_of_a_seed_count() -> None:
    logits = np.zeros((64, 1000), np.float32)
    low, high = draw(logits, make_wishes(64, seed=3)), draw(logits, make_wishes(64, seed=3 + 2**32))
    assert len(set(low)) == len(set(high)) == 1
    assert low[0] != high[0]


def test_a_draw_depends_on_its_own_row_only() -> None:
    rows = 48
    rng = np.random.default_rng(0)
    logits, positions, seeds = make_logits("ties", rows, 50), rng.integers(0, 9999, rows), rng.integers(0, 2**62, rows)
    temperature, top_k = rng.choice([0.0, 0.7, 1.3], rows), rng.choice([0, 5], rows)
    top_p, min_p = rng.choice([0.8, 1.0], rows), rng.choice([0.0, 0.1], rows)

    def drawn(chosen: np.ndarray) -> np.ndarray:
        wishes = make_wishes(
            len(chosen), temperature[chosen], top_k[chosen], top_p[chosen], min_p[chosen], seeds[chosen]
        )
        return draw(logits[chosen], wishes, positions[chosen])

    together = drawn(np.arange(rows))
    order = rng.permutation(rows)
    np.testing.assert_array_equal(drawn(order), together[order])
    # Rows that cut nothing do the same without those that cut: the search for a threshold is then left out.
    uncut = np.flatnonzero((top_k == 0) & (top_p == 1))
    np.testing.assert_array_equal(drawn(uncut), together[uncut])
    for row in range(4):
        np.testing.assert_array_equal(drawn(np.array([row])), together[[row]])


def test_a_hot_row_draws_from_everything_and_never_what_is_impossible() -> None:
    logits = make_logits("holes", 4096, 8)
    tokens = draw(logits, make_wishes(4096, temperature=1e38))
    assert (np.take_along_axis(logits, tokens[:, None], 1) > -np.inf).all()
    assert set(tokens) == set(range(8))


# ---- log-probabilities ----


@pytest.mark.parametrize("count", [1, 5, 50])
@pytest.mark.parametrize("kind", ["normal", "ties", "holes", "equal"])
def test_log_probabilities_and_ranks(kind: str, count: int) -> None:
    rows, vocab = 40, 50
    logits = make_logits(kind, rows, vocab)
    tokens = np.random.default_rng(1).integers(0, vocab, rows).astype(np.int32)
    own, rank, ids, values = (np.asarray(array) for array in LOGPROBS(logits, tokens, count=count))
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    chosen = np.take_along_axis(expected, tokens[:, None], 1)
    np.testing.assert_allclose(own, chosen[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rank, 1 + (logits > np.take_along_axis(logits, tokens[:, None], 1)).sum(-1))
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_allclose(values, np.take_along_axis(expected, best, 1), rtol=1e-5, atol=1e-5)
    assert ids.dtype == rank.dtype == np.int32
