"""StepEdits to logits against transformers' processors and loops that count; what is reported against a plain sort."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import generation

from trtllm_jax.engine.logit_edits import LogitEdits, top_logprobs
from trtllm_jax.engine.sampling import NucleusDecay

VOCAB = 9
ids = st.lists(st.integers(0, VOCAB - 1), max_size=12)
some_ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def random_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=VOCAB, scale=3).astype(np.float32)


def edited(edits: LogitEdits, logits: np.ndarray, prompt: Sequence[int], generated: Sequence[int] = ()) -> np.ndarray:
    changed = logits.copy()
    edits.apply(changed, prompt, generated)
    return changed


def by_transformers(processor: Any, logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    scores = processor(torch.tensor([tokens]), torch.from_numpy(logits.copy())[None])
    return scores[0].numpy()


class TestAgainstTransformers:
    @given(prompt=some_ids, generated=ids, penalty=st.sampled_from([0.5, 1.1, 3.0]), seed=st.integers(0, 99))
    def test_repetition(self, prompt: list[int], generated: list[int], penalty: float, seed: int) -> None:
        logits = random_logits(seed)
        logits[seed % VOCAB] = 0
        processor = generation.RepetitionPenaltyLogitsProcessor(penalty)
        expected = by_transformers(processor, logits, prompt + generated)
        np.testing.assert_allclose(
            edited(LogitEdits(repetition=penalty), logits, prompt, generated), expected, rtol=1e-6
        )

    @given(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=8),
        generated=st.lists(st.integers(0, 2), max_size=8),
        size=st.integers(1, 5),
    )
    def test_repeated_ngrams(self, prompt: list[int], generated: list[int], size: int) -> None:
        logits = random_logits(size)
        processor = generation.NoRepeatNGramLogitsProcessor(size)
        expected = by_transformers(processor, logits, prompt + generated)
        np.testing.assert_array_equal(edited(LogitEdits(no_repeat_ngram=size), logits, prompt, generated), expected)

    @given(
        prompt=st.lists(st.integers(0, 2), min_size=3, max_size=6),
        bad=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=4),
    )
    def test_bad_sequences(self, prompt: list[int], bad: list[list[int]]) -> None:
        logits = random_logits(1)
        processor = generation.NoBadWordsLogitsProcessor(bad)
        expected = by_transformers(processor, logits, prompt)
        found = edited(LogitEdits(bad=tuple(map(tuple, bad))), logits, prompt[:1], prompt[1:])
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("new", [0, 1, 2, 3])
    def test_least_length(self, new: int) -> None:
        logits, prompt = random_logits(2), [1, 2, 3]
        processor = generation.MinNewTokensLengthLogitsProcessor(len(prompt), 2, [4, 7])
        generated = [5] * new
        expected = by_transformers(processor, logits, prompt + generated)
        found = edited(LogitEdits(min_tokens=2, ends=frozenset({4, 7})), logits, prompt, generated)
        np.testing.assert_array_equal(found, expected)

    def test_bias(self) -> None:
        logits, bias = random_logits(3), {(2,): -4.0, (5,): 2.5}
        expected = by_transformers(generation.SequenceBiasLogitsProcessor(bias), logits, [1])
        dense = np.zeros(VOCAB, np.float32)
        for (token,), value in bias.items():
            dense[token] = value
        np.testing.assert_allclose(edited(LogitEdits(bias=dense), logits, [1]), expected)

    def test_several_in_their_order(self) -> None:
        logits, tokens = random_logits(4), [1, 2, 1, 3, 1]
        several = generation.LogitsProcessorList(
            [
                generation.RepetitionPenaltyLogitsProcessor(1.7),
                generation.NoRepeatNGramLogitsProcessor(2),
                generation.NoBadWordsLogitsProcessor([[0], [1, 8]]),
                generation.MinNewTokensLengthLogitsProcessor(2, 9, [6]),
            ]
        )
        edits = LogitEdits(repetition=1.7, no_repeat_ngram=2, bad=((0,), (1, 8)), min_tokens=9, ends=frozenset({6}))
        np.testing.assert_allclose(
            edited(edits, logits, tokens[:2], tokens[2:]), by_transformers(several, logits, tokens), rtol=1e-6
        )


class TestByCounting:
    @given(
        prompt=some_ids,
        generated=ids,
        presence=st.sampled_from([0.0, 1.5, -0.5]),
        frequency=st.sampled_from([0.0, 0.25, -1.0]),
        ignored=st.integers(0, 14),
    )
    def test_presence_and_frequency(
        self, prompt: list[int], generated: list[int], presence: float, frequency: float, ignored: int
    ) -> None:
        logits = random_logits(5)
        counts = Counter(
            token for place, token in enumerate(prompt + generated) if not place < min(ignored, len(prompt))
        )
        expected = [
            score - (presence + frequency * counts[token] if token in counts else 0)
            for token, score in enumerate(logits.tolist())
        ]
        edits = LogitEdits(presence=presence, frequency=frequency, ignored_prompt=ignored)
        np.testing.assert_allclose(edited(edits, logits, prompt, generated), expected, rtol=1e-5, atol=1e-6)

    def test_a_prompt_that_is_ignored_still_repeats(self) -> None:
        logits = np.ones(VOCAB, np.float32)
        found = edited(LogitEdits(repetition=2.0, presence=0.25, ignored_prompt=9), logits, [1, 2], [3])
        assert found.tolist() == [1, 0.5, 0.5, 0.25, 1, 1, 1, 1, 1]

    def test_the_bias_is_penalised_with_what_it_is_added_to(self) -> None:
        bias = np.full(VOCAB, 3, np.float32)
        found = edited(LogitEdits(bias=bias, repetition=2.0), np.ones(VOCAB, np.float32), [0])
        assert found.tolist() == [2, *[4] * (VOCAB - 1)]

    def test_without_changes_nothing_changes(self) -> None:
        logits = random_logits(6)
        np.testing.assert_array_equal(edited(LogitEdits(), logits, [1, 2], [3, 3]), logits)


def banned(edits: LogitEdits, prompt: Sequence[int], generated: Sequence[int] = ()) -> list[int]:
    return np.flatnonzero(np.isneginf(edited(edits, random_logits(7), prompt, generated))).tolist()


class TestBans:
    @pytest.mark.parametrize(
        ("prompt", "generated", "expected"),
        [
            ([1], [], [2]),  # which transformers lets pass: it takes a text of one id to be too short for two
            ([0, 1], [2], [3]),
            ([0], [1, 2], [3]),
            ([1, 2], [0], []),
            ([2], [], []),
        ],
    )
    def test_a_bad_sequence_may_begin_in_the_prompt(
        self, prompt: list[int], generated: list[int], expected: list[int]
    ) -> None:
        edits = LogitEdits(bad=((1, 2, 3),) if len(prompt + generated) > 1 else ((1, 2),))
        assert banned(edits, prompt, generated) == expected

    def test_ids_that_the_model_does_not_have_are_left_out(self) -> None:
        edits = LogitEdits(bad=((VOCAB,), (2,), (1, VOCAB + 5)), min_tokens=1, ends=frozenset({3, VOCAB + 1}))
        assert banned(edits, [1]) == [2, 3]

    @pytest.mark.parametrize("prompt", [[1], [1, 2], [1, 2, 1]])
    def test_texts_shorter_than_an_ngram(self, prompt: list[int]) -> None:
        assert banned(LogitEdits(no_repeat_ngram=4), prompt) == []

    def test_an_end_that_is_all_that_is_left_may_come(self) -> None:
        logits = np.full(VOCAB, -np.inf, np.float32)
        logits[4] = 1
        np.testing.assert_array_equal(edited(LogitEdits(min_tokens=5, ends=frozenset({4})), logits, [0]), logits)

    def test_repeating_is_better_than_a_bad_word(self) -> None:
        edits = LogitEdits(no_repeat_ngram=1, bad=((0,), (8,)), min_tokens=99, ends=frozenset({7}))
        assert banned(edits, range(VOCAB)) == [0, 7, 8]

    def test_nothing_is_left_where_all_is_bad(self) -> None:
        assert banned(LogitEdits(bad=tuple((token,) for token in range(VOCAB))), [1]) == list(range(VOCAB))


class TestNucleusDecay:
    @given(
        start=st.floats(0.01, 1),
        decay=st.floats(0.1, 1),
        least=st.floats(1e-6, 1),
        generated=st.lists(st.integers(0, 4), max_size=30),
        reset_id=st.integers(-1, 4),
    )
    def test_it_falls_token_by_token(
        self, start: float, decay: float, least: float, generated: list[int], reset_id: int
    ) -> None:
        top_p = start
        for length, token in enumerate(generated):
            assert NucleusDecay(decay, least, reset_id).top_p(start, generated[:length]) == pytest.approx(top_p)
            top_p = start if token == reset_id else max(top_p * decay, min(least, start))
        assert NucleusDecay(decay, least, reset_id).top_p(start, generated) == pytest.approx(top_p)

    def test_it_is_never_zero(self) -> None:
        assert NucleusDecay(0.01, 1e-6).top_p(0.9, [3] * 5000) == 1e-6


class TestTopLogprobs:
    @given(
        logits=st.lists(st.sampled_from([-np.inf, -2.0, 0.0, 0.5, 3.0, 3.5]), min_size=1, max_size=12).filter(
            lambda values: max(values) > -np.inf
        ),
        count=st.integers(0, 14),
        data=st.data(),
    )
    def test_equals_a_sort(self, logits: list[float], count: int, data: st.DataObject) -> None:
        token = data.draw(st.integers(0, len(logits) - 1))
        weights = np.exp(np.array(logits))
        with np.errstate(divide="ignore"):
            expected = np.log(weights / weights.sum())
        top, own, rank = top_logprobs(np.array(logits, np.float32), count, token)
        order = sorted(range(len(logits)), key=lambda index: (-logits[index], index))[:count]
        assert [index for index, _ in top] == order
        np.testing.assert_allclose([value for _, value in top], expected[order])
        np.testing.assert_allclose(own, expected[token])
        assert rank == 1 + sum(other > logits[token] for other in logits)

    def test_large_logits_do_not_overflow(self) -> None:
        top, own, rank = top_logprobs(np.array([1e4, 1e4, -1e4], np.float32), 1, 1)
        assert top == [(0, pytest.approx(-np.log(2)))]
        assert (own, rank) == (pytest.approx(-np.log(2)), 1)

    def test_without_a_token(self) -> None:
        top, own, rank = top_logprobs(np.zeros(4, np.float32), 2)
        assert ([index for index, _ in top], rank) == ([0, 1], 0)
        assert np.isnan(own)


@pytest.mark.parametrize("penalty", [1e-45, 1e-320, 1e300])
def test_an_extreme_penalty_warns_nobody(penalty: float) -> None:
    logits = np.array([1.0, -1.0, 0.0, 2.0], np.float32)
    LogitEdits(repetition=penalty).apply(logits, [0, 1, 2], [])
    assert logits[3] == 2.0
