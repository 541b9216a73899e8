"""What a row's wishes mean, against transformers' logits processors, and log-probabilities against torch.

`tests/pallas_kernels/test_sampling.py` has what holds for any draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trtllm_jax.engine import sampler
from trtllm_jax.engine.row_state import MAX_DEVICE_STOPS, RowSamplingParams

LOGPROBS = jax.jit(sampler.logprobs, static_argnames="count")
SAMPLE = jax.jit(sampler.sample)


@dataclass(frozen=True)
class Setting:
    """What a user asks of a row's draws."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """What transformers draws from, for one row of logits [v]."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return torch.softmax(warpers(None, torch.from_numpy(logits[None]))[0].double(), -1).numpy()


CUTS = [
    Setting(),
    *[Setting(top_k=k) for k in (1, 7, 50, 99)],
    *[Setting(top_p=p) for p in (0.1, 0.5, 0.95, 0.999)],
    *[Setting(min_p=p) for p in (0.4, 0.7, 1.0)],
    Setting(top_k=20, top_p=0.9),
    Setting(top_k=20, top_p=0.9, min_p=0.2),
]
MIXTURES = [
    Setting(),
    Setting(0.5),
    Setting(2.5),
    Setting(top_k=3),
    Setting(1.5, top_p=0.7),
    Setting(min_p=0.3),
    Setting(2.0, top_k=5, top_p=0.9),
    Setting(2.0, top_k=7, top_p=0.95, min_p=0.25),
]


def make_wishes(settings: list[Setting], seeds: np.ndarray) -> RowSamplingParams:
    """The wishes of a row a seed, uint64; the settings take equal shares of the rows, in order."""
    rows = [setting for setting in settings for _ in range(len(seeds) // len(settings))]

    def column(name: str, dtype: type) -> jax.Array:
        return jnp.asarray([getattr(row, name) for row in rows], dtype)

    return RowSamplingParams(
        limit=jnp.zeros(len(rows), jnp.int32),
        stop_ids=jnp.full((len(rows), MAX_DEVICE_STOPS), -1, jnp.int32),
        temperature=column("temperature", jnp.float32),
        top_k=column("top_k", jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        seed=jnp.asarray(np.stack([seeds >> 32, seeds & 0xFFFFFFFF], axis=1).astype(np.uint32)),
    )


def draw_by_setting(logits: np.ndarray, settings: list[Setting], draws: int, varied: str) -> np.ndarray:
    """`draws` tokens for every setting, all in one batch over the same logits [v]: [settings, draws]."""
    numbers = np.arange(len(settings) * draws)
    same = np.full_like(numbers, 5)
    seeds, positions = (numbers, same) if varied == "seed" else (same, numbers)
    sampling = make_wishes(settings, seeds.astype(np.uint64))
    tokens = SAMPLE(np.broadcast_to(logits, (numbers.size, logits.size)), sampling, positions.astype(np.int32))
    return np.asarray(tokens).reshape(len(settings), draws)


def test_cuts_keep_what_transformers_keeps() -> None:
    """Flat rows draw everything that is left, so what is seen is what is kept."""
    logits = np.random.default_rng(0).permutation(np.linspace(-0.5, 0.5, 50)).astype(np.float32)
    seen = draw_by_setting(logits, CUTS, 600, "seed")
    for setting, tokens in zip(CUTS, seen, strict=True):
        assert set(tokens) == set(np.flatnonzero(setting.probabilities(logits))), setting


@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_have_the_distribution_that_transformers_draws_from(varied: str) -> None:
    draws = 4000
    logits = np.array([2.0, 1.5, 1.0, 0.6, 0.0, -0.5, -1.0, -np.inf], np.float32)
    drawn = draw_by_setting(logits, MIXTURES, draws, varied)
    for setting, tokens in zip(MIXTURES, drawn, strict=True):
        counts, expected = np.bincount(tokens, minlength=8), setting.probabilities(logits) * draws
        possible = expected > 0
        assert not counts[~possible].any(), setting
        assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3, setting


def test_draws_of_neighbouring_seeds_and_positions_are_independent() -> None:
    side, vocab = 80, 4
    seeds, positions = np.divmod(np.arange(side * side), side)
    sampling = make_wishes([Setting()], seeds.astype(np.uint64))
    tokens = SAMPLE(np.zeros((side * side, vocab), np.float32), sampling, positions.astype(np.int32))
    table = np.asarray(tokens).reshape(side, side)
    for first, second in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1])):
        pairs = np.zeros((vocab, vocab))
        np.add.at(pairs, (first.ravel(), second.ravel()), 1)
        assert stats.chi2_contingency(pairs).pvalue > 1e-3


def make_logits(kind: str, rows: int, vocab: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, vocab)) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "holes":
        holes = rng.random((rows, vocab)) < 0.5
        holes[:, 0] = False
        logits[holes] = -np.inf
    elif kind == "equal":
        logits[:] = -0.0
    return logits.astype(np.float32)


@pytest.mark.parametrize(
    ("vocab", "count"),
    # Few of many are looked for block by block; not always do the blocks come out even.
    [
        (50, 1),
        (50, 5),
        (50, 50),
        (sampler.BLOCK * 5, 5),
        (sampler.BLOCK * 5 + 1, 5),
        (sampler.BLOCK * 9, 1),
        (sampler.BLOCK * 30 - 3, 20),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "ties", "holes", "equal"])
def test_log_probabilities_and_ranks(kind: str, vocab: int, count: int) -> None:
    rows = 40
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
