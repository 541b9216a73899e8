"""What changes logits or chooses among samples, through the public API, against transformers."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trtllm_jax import LLM, SamplingParams
from trtllm_jax.engine.packer import Packer

from ..tiny_engine import SIZES, tiny_engine
from .sampled import EOS, VOCAB, Logits, LogitsAfter, free, greedily, ids, tokens_of

ROWS, STEP_TOKENS = SIZES["max_batch_size"], SIZES["max_num_tokens"]


class TestChanges:
    PROMPT = ids(12)

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
            ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
            ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
            (
                {"repetition_penalty": 0.7, "no_repeat_ngram_size": 2},
                {"repetition_penalty": 0.7, "no_repeat_ngram_size": 2},
            ),
            (
                {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_token_ids": [*range(0, 256, 2)]},
                {
                    "repetition_penalty": 1.2,
                    "no_repeat_ngram_size": 3,
                    "bad_words_ids": [[token] for token in range(0, 256, 2)],
                },
            ),
        ],
    )
    def test_equals_transformers(
        self, llm: LLM, generate_by_transformers: Any, ours: dict[str, Any], theirs: dict[str, Any]
    ) -> None:
        expected = generate_by_transformers(self.PROMPT, 40, **theirs)
        assert expected != generate_by_transformers(self.PROMPT, 40)
        assert tokens_of(llm, self.PROMPT, max_tokens=40, **ours) == expected

    @pytest.mark.parametrize("sampled", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95, "seed": 5}])
    def test_the_host_draws_the_same_where_much_changes(
        self, llm: LLM, sampled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wishes = [
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logprobs": 2},
            {"presence_penalty": 1.0, "frequency_penalty": 0.5, "min_tokens": 5, "end_id": 7},
            {"embedding_bias": np.linspace(-3, 3, VOCAB), "bad_token_ids": [1, 2]},
            {"top_p_decay": 0.9, "top_p_min": 0.1} if sampled["temperature"] else {},
        ]

        def answers() -> tuple[list[list[int]], list[float]]:
            outputs = llm.generate([self.PROMPT] * len(wishes), [free(**sampled | wish) for wish in wishes])
            scores = [entry.logprob for step in outputs[0].outputs[0].logprobs for entry in step.values()]
            return [output.outputs[0].token_ids for output in outputs], scores

        tokens, scores = answers()
        drawn = []
        draw = Packer.draw
        monkeypatch.setattr(
            Packer, "draw", lambda self, logits, rows: drawn.append(len(rows)) or draw(self, logits, rows)
        )
        assert answers() == (tokens, scores)
        assert not drawn
        # The same by lists that the host writes, then by the host itself.
        monkeypatch.setattr("trtllm_jax.engine.request._on_device", lambda edits: False)
        by_lists = answers()
        assert not drawn
        assert by_lists[0] == tokens
        np.testing.assert_allclose(by_lists[1], scores, atol=1e-5)
        monkeypatch.setattr("trtllm_jax.engine.request.MAX_EDITS", -1)
        by_the_host = answers()
        assert drawn
        assert by_the_host[0] == tokens
        np.testing.assert_allclose(by_the_host[1], scores, atol=1e-5)

    @pytest.mark.slow
    def test_two_devices_draw_the_same(self, llm: LLM, tiny_llama: Path) -> None:
        wishes = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_token_ids": [1, 2]}
        with tiny_engine(tiny_llama, tensor_parallel_size=2) as two:
            assert tokens_of(two, self.PROMPT, **wishes) == tokens_of(llm, self.PROMPT, **wishes)

    @pytest.mark.parametrize("ignored", [0, 5, 12, 50])
    @pytest.mark.parametrize(("presence", "frequency"), [(4.0, 0.0), (0.0, 2.0), (3.0, -0.5)])
    def test_presence_and_frequency(
        self, llm: LLM, logits_by_transformers: LogitsAfter, presence: float, frequency: float, ignored: int
    ) -> None:
        prompt = [3, 3, 90, 90, 7, 200, 200, 200, 31, 30, 29, 3]

        def penalise(logits: Logits, tokens: list[int]) -> None:
            for token, count in Counter(tokens[min(ignored, len(prompt)) :]).items():
                logits[token] -= presence + frequency * count

        found = tokens_of(
            llm,
            prompt,
            presence_penalty=presence,
            frequency_penalty=frequency,
            prompt_ignore_length=ignored,
            max_tokens=12,
        )
        assert found == greedily(logits_by_transformers, prompt, penalise, count=12)

    def test_bias(self, llm: LLM, logits_by_transformers: LogitsAfter) -> None:
        bias = np.random.default_rng(1).normal(size=VOCAB, scale=2)
        bias[::3] = -np.inf

        def add(logits: Logits, tokens: list[int]) -> None:
            logits += bias

        found = tokens_of(llm, self.PROMPT, embedding_bias=bias)
        assert found == greedily(logits_by_transformers, self.PROMPT, add)
        assert all(token % 3 for token in found)

    @pytest.mark.parametrize("least", [0, 4, 12])
    def test_no_end_before_the_least_length(self, llm: LLM, generate_by_transformers: Any, least: int) -> None:
        end = generate_by_transformers(self.PROMPT, 4)[2]
        more = {"min_new_tokens": least} if least else {}
        expected = generate_by_transformers(self.PROMPT, 30, eos_token_id=end, **more)
        params = SamplingParams(max_tokens=30, end_id=end, min_tokens=least)
        output = llm.generate(self.PROMPT, params).outputs[0]
        assert [*output.token_ids, *([end] if output.finish_reason == "stop" else [])] == expected
        assert output.length >= least

    def test_stop_ids_wait_for_the_least_length_too(self, llm: LLM, greedy_by_transformers: Any) -> None:
        stops = greedy_by_transformers(self.PROMPT, 5)
        found = tokens_of(llm, self.PROMPT, stop_token_ids=stops, min_tokens=8)
        assert len(found) >= 8
        assert not set(found) & set(stops)

    @pytest.mark.parametrize("sampled", [{}, {"temperature": 1.5, "seed": 3}])
    def test_bad_words_are_never_in_the_text(self, llm: LLM, sampled: dict[str, Any]) -> None:
        text = llm.generate("bad", free(max_tokens=100, **sampled)).outputs[0].text
        words = [text[place : place + 3] for place in range(0, len(text) - 3, 7)]
        words = [word for word in words if "\ufffd" not in word][:6]
        assert len(words) > 2
        for one_or_many in (words[0], words):
            found = llm.generate("bad", free(max_tokens=100, bad=one_or_many, **sampled)).outputs[0].text
            assert not any(word in found for word in ([one_or_many] if isinstance(one_or_many, str) else words))

    def test_a_bad_id_is_never_drawn(self, llm: LLM) -> None:
        allowed = {5, 6, 7}
        found = tokens_of(llm, "x", bad_token_ids=[*set(range(VOCAB)) - allowed], temperature=5.0, max_tokens=50)
        assert set(found) == allowed

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"bad_token_ids": [1, VOCAB]}, r"bad_token_ids holds 258; ids of this model are 0 to 257"),
            ({"top_p": 0.9, "top_p_reset_ids": VOCAB, "top_p_decay": 0.5}, "top_p_reset_ids holds 258"),
            (
                {"embedding_bias": [0.0] * (VOCAB - 1)},
                "embedding_bias has 257 entries; this model's vocabulary has 258",
            ),
        ],
    )
    def test_what_does_not_fit_the_vocabulary_is_named(self, llm: LLM, arguments: dict[str, Any], says: str) -> None:
        llm.get_stats()
        with pytest.raises(ValueError, match=says):
            llm.generate(["good", "bad"], [free(), free(**arguments)])
        assert llm.get_stats() == []


def nucleus(logits: Logits, top_p: float) -> Logits:
    """The probabilities of the fewest likeliest ids that have `top_p` together, by the definition."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    weights /= weights.sum()
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    kept = np.zeros_like(weights)
    kept[order[before < top_p]] = weights[order[before < top_p]]
    return kept / kept.sum()


class TestFallingTopP:
    PROMPT = ids(6, 3)

    @pytest.mark.parametrize("reset", [None, "likeliest"])
    def test_pairs_come_as_often_as_they_should(
        self, llm: LLM, logits_by_transformers: LogitsAfter, reset: str | None
    ) -> None:
        start, decay, least, draws = 0.6, 0.4, 0.3, 800
        first = nucleus(logits_by_transformers(self.PROMPT)[-1], start)
        reset_id = EOS if reset is None else int(first.argmax())
        expected = {
            (one, other): first[one] * probability
            for one in np.flatnonzero(first).tolist()
            for other, probability in enumerate(
                nucleus(logits_by_transformers([*self.PROMPT, one])[-1], start if one == reset_id else least)
            )
            if probability
        }
        params = free(
            n=draws, top_p=start, top_p_decay=decay, top_p_min=least, top_p_reset_ids=reset_id, seed=1, max_tokens=2
        )
        found = Counter(tuple(sample.token_ids) for sample in llm.generate(self.PROMPT, params).outputs)
        assert found.keys() <= expected.keys()
        often = {pair: chance for pair, chance in expected.items() if chance * draws >= 5}
        observed, chances = [found[pair] for pair in often], list(often.values())
        rare = [draws - sum(observed)], [1 - sum(chances)]
        assert stats.chisquare(observed + rare[0], np.array(chances + rare[1]) * draws).pvalue > 0.001
        without = Counter(
            tuple(s.token_ids) for s in llm.generate(self.PROMPT, free(n=64, top_p=start, seed=1, max_tokens=2)).outputs
        )
        assert not without.keys() <= expected.keys()

    def test_it_falls_with_every_token(self, llm: LLM, logits_by_transformers: LogitsAfter) -> None:
        found = tokens_of(llm, self.PROMPT, top_p=1.0, temperature=1.0, top_p_decay=0.5, seed=2, max_tokens=12)
        logits = logits_by_transformers([*self.PROMPT, *found])[len(self.PROMPT) - 1 : -1]
        assert all(nucleus(scores, 0.5**place)[found[place]] for place, scores in enumerate(logits))
        assert found[8:] == logits.argmax(1)[8:].tolist()


class TestBestOf:
    @pytest.mark.parametrize("logprobs", [None, 2])
    def test_the_likeliest_come_first(self, llm: LLM, logprobs: int | None) -> None:
        arguments = {"temperature": 1.0, "seed": 4, "max_tokens": 8}
        every = llm.generate(ids(9), free(n=6, logprobs=0, **arguments)).outputs
        every.sort(
            key=lambda sample: (
                -sum(entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True))
            )
        )
        best = llm.generate(ids(9), free(n=2, best_of=6, logprobs=logprobs, **arguments)).outputs
        assert [sample.token_ids for sample in best] == [sample.token_ids for sample in every[:2]]
        assert [sample.index for sample in best] == [0, 1]
        assert [sample.cumulative_logprob for sample in best] == [
            pytest.approx(sample.cumulative_logprob, abs=1e-4) for sample in every[:2]
        ]
        assert all(len(entry) >= (logprobs or 1) for sample in best for entry in sample.logprobs)

    def test_one_of_many_with_edits(self, llm: LLM) -> None:
        arguments = {"temperature": 1.0, "seed": 4, "max_tokens": 8, "presence_penalty": 3.0}
        every = llm.generate(ids(9), free(n=5, logprobs=0, **arguments)).outputs
        (best,) = llm.generate(ids(9), free(best_of=5, **arguments)).outputs
        assert best.token_ids == max(every, key=lambda sample: sample.cumulative_logprob or 0).token_ids

    def test_not_while_it_streams(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match=r"best_of = 3 is invalid with streaming.*leave out best_of or streaming"):
            llm.generate_async("a", free(best_of=3, temperature=1.0), streaming=True)
