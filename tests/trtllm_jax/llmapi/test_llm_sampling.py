"""What changes or reports logits, through the public API, against transformers and against the same requests alone."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trtllm_jax import LLM, SamplingParams
from trtllm_jax.engine.packer import Packer
from trtllm_jax.llmapi import KvCacheConfig, SchedulerConfig
from trtllm_jax.sampling_params import BatchedLogitsProcessor, LogitsProcessor

from ..tiny_engine import FIRST_TOKENS, SIZES, held, tiny_engine

EOS, SPECIAL, VOCAB = 256, 257, 258
ROWS, STEP_TOKENS = SIZES["max_batch_size"], SIZES["max_num_tokens"]
Logits = np.ndarray[Any, np.dtype[np.float32]]
LogitsAfter = Callable[[list[int]], Logits]


class Doubled(BatchedLogitsProcessor):
    """Doubles logits, as a temperature of 0.5 would, and remembers for whom."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.fails = False

    def __call__(
        self, req_ids: list[int], logits: list[Logits], token_ids: Any, stream_ptr: Any, client_ids: list[Any]
    ) -> None:
        if self.fails:
            raise ArithmeticError("no more doubling")
        assert len(req_ids) == len(logits) == len(token_ids) == len(client_ids)
        assert all(scores.shape == (1, 1, VOCAB) for scores in logits)
        self.calls.append(req_ids)
        for scores in logits:
            scores *= 2


DOUBLED = Doubled()


def make(folder: Path, **kwargs: Any) -> LLM:
    return tiny_engine(folder, **kwargs)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with make(tiny_llama, batched_logits_processor=DOUBLED) as llm:
        yield llm


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def free(**arguments: Any) -> SamplingParams:
    """Parameters of a sequence that only its length ends."""
    return SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **arguments})


def tokens_of(llm: LLM, prompt: Any, **arguments: Any) -> list[int]:
    return llm.generate(prompt, free(**arguments)).outputs[0].token_ids


def greedily(
    logits_after: LogitsAfter, prompt: list[int], change: Callable[[Logits, list[int]], None], count: int = 20
) -> list[int]:
    """The likeliest ids, one by one, of logits that `change` had before."""
    tokens = list(prompt)
    for _ in range(count):
        logits = logits_after(tokens)[-1]
        change(logits, tokens)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


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
        with make(tiny_llama, tensor_parallel_size=2) as two:
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


def check_prompt_logprobs(
    entries: Sequence[dict[int, Any]], prompt: list[int], first: int, logits: Logits, count: int
) -> None:
    """As in TensorRT-LLM: entry i is of the logits after token i, and has token i + 1, or the first that was drawn."""
    scores = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert len(entries) == len(prompt)
    for entry, row, follows in zip(entries, scores, [*prompt[1:], first], strict=True):
        order = np.argsort(-row)
        assert list(entry)[:count] == order[:count].tolist()
        assert list(entry)[count:] in ([], [follows])
        assert entry[follows].rank == 1 + order.tolist().index(follows)
        for token, value in entry.items():
            assert value.logprob == pytest.approx(row[token], abs=1e-4)


class TestReports:
    @pytest.mark.parametrize("length", [1, 7, 8, 90])
    def test_logits_of_the_prompt(self, llm: LLM, logits_by_transformers: LogitsAfter, length: int) -> None:
        """Among others, longer than a step and than its rows, and known to the cache already."""
        prompt, other = ids(length, 21), ids(40, 22)
        alone = tokens_of(llm, prompt), tokens_of(llm, other)
        expected = logits_by_transformers(prompt)
        llm.get_stats()
        params = free(return_context_logits=True, prompt_logprobs=3)
        plain, told, after = llm.generate([other, prompt, prompt], [free(), params, free()])
        assert told.context_logits.dtype == np.float32
        np.testing.assert_allclose(told.context_logits, expected, atol=1e-4)
        sample = told.outputs[0]
        check_prompt_logprobs(sample.prompt_logprobs, prompt, sample.token_ids[0], expected, 3)
        assert [one.outputs[0].token_ids for one in (told, after, plain)] == [alone[0], alone[0], alone[1]]
        assert plain.context_logits is None
        assert plain.outputs[0].prompt_logprobs == []
        steps = [step["inflightBatchingStats"] for step in llm.get_stats()]
        computed = length + 2 * 8  # the told prompt, and of each other the last block at most
        assert length < sum(step["numCtxTokens"] for step in steps) <= computed
        assert max(step["numScheduledRequests"] for step in steps) <= 3

    def test_a_prompt_is_found_in_the_cache_after_its_logits_were_told(self, llm: LLM) -> None:
        prompt = ids(64, 23)
        first = llm.generate(prompt, free(prompt_logprobs=0)).outputs[0]
        llm.get_stats()
        assert tokens_of(llm, prompt) == first.token_ids
        assert sum(step["inflightBatchingStats"]["numCtxTokens"] for step in llm.get_stats()) == 8

    def test_every_sample_has_the_prompts(self, llm: LLM, logits_by_transformers: LogitsAfter) -> None:
        prompt = ids(11, 24)
        params = free(n=3, temperature=1.0, seed=1, prompt_logprobs=True, return_context_logits=True, max_tokens=5)
        output = llm.generate(prompt, params)
        expected = logits_by_transformers(prompt)
        np.testing.assert_allclose(output.context_logits, expected, atol=1e-4)
        for sample in output.outputs:
            check_prompt_logprobs(sample.prompt_logprobs, prompt, sample.token_ids[0], expected, 1)
        assert len({sample.token_ids[0] for sample in output.outputs}) > 1

    def test_the_last_entry_has_an_end_that_is_not_shown(
        self, llm: LLM, greedy_by_transformers: Any, logits_by_transformers: LogitsAfter
    ) -> None:
        prompt = ids(9)
        (first,) = greedy_by_transformers(prompt, 1)
        sample = llm.generate(prompt, free(stop_token_ids=[first], prompt_logprobs=2, logprobs=2)).outputs[0]
        assert (sample.token_ids, sample.logprobs, sample.cumulative_logprob) == ([], [], None)
        check_prompt_logprobs(sample.prompt_logprobs, prompt, first, logits_by_transformers(prompt), 2)
        token, alternatives = sample.end_logprobs
        assert token == first
        assert list(alternatives) == list(sample.prompt_logprobs[-1])
        assert alternatives[first].logprob == pytest.approx(sample.prompt_logprobs[-1][first].logprob, abs=1e-5)
        shown = llm.generate(prompt, free(stop_token_ids=[first], logprobs=2, include_stop_str_in_output=True)).outputs[
            0
        ]
        assert (shown.token_ids, shown.end_logprobs) == ([first], None)

    def test_a_stream_tells_the_prompts_logits_as_they_come(
        self, llm: LLM, logits_by_transformers: LogitsAfter
    ) -> None:
        prompt, seen, first_seen = ids(20, 25), [], threading.Event()

        def wait(*_: Any) -> None:
            """Keeps the first id back until the test has seen an update of the prompt alone."""
            assert first_seen.wait(60)

        reports = {"prompt_logprobs": 1, "return_context_logits": True, "return_generation_logits": True}
        for output in llm.generate_async(prompt, free(**reports, logits_processor=wait), streaming=True):
            sample = output.outputs[0]
            assert len(sample.prompt_logprobs) == len(output.context_logits)
            generated = 0 if sample.generation_logits is None else len(sample.generation_logits)
            assert generated == sample.length
            seen.append(len(output.context_logits))
            first_seen.set()
        assert seen == sorted(seen)
        assert seen[0] < len(prompt) == seen[-1]
        np.testing.assert_allclose(output.context_logits, logits_by_transformers(prompt), atol=1e-4)

    @pytest.mark.parametrize("edits", [{}, {"repetition_penalty": 2.0}, {"temperature": 1.0, "seed": 1}])
    def test_what_the_tokens_were_drawn_from(
        self, llm: LLM, logits_by_transformers: LogitsAfter, edits: dict[str, Any]
    ) -> None:
        prompt = ids(10, 26)
        output = llm.generate(prompt, free(return_generation_logits=True, **edits)).outputs[0]
        assert output.token_ids == tokens_of(llm, prompt, **edits)
        expected = logits_by_transformers([*prompt, *output.token_ids])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(output.generation_logits, expected, atol=1e-4)

    def test_logits_of_a_stop_are_taken_with_it(self, llm: LLM, greedy_by_transformers: Any) -> None:
        prompt = ids(9)
        drawn = greedy_by_transformers(prompt, 10)
        stopped = llm.generate(prompt, free(stop_token_ids=[drawn[5]], return_generation_logits=True)).outputs[0]
        assert stopped.generation_logits.shape == (stopped.length, VOCAB)
        assert stopped.length == drawn.index(drawn[5])
        text = llm.generate("go", free(max_tokens=40)).outputs[0].text
        by_text = llm.generate("go", free(max_tokens=40, stop=text[15:18], return_generation_logits=True)).outputs[0]
        assert by_text.generation_logits.shape == (by_text.length, VOCAB)

    @pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "top_k": 40, "seed": 6}])
    def test_logprobs_are_those_that_the_device_tells(self, llm: LLM, sampled: dict[str, Any]) -> None:
        prompt = ids(10, 27)
        device = llm.generate(prompt, free(logprobs=4, **sampled)).outputs[0]
        host = llm.generate(prompt, free(logprobs=4, logits_processor=unchanged, **sampled)).outputs[0]
        assert host.token_ids == device.token_ids
        assert [list(entry) for entry in host.logprobs] == [list(entry) for entry in device.logprobs]
        for mine, other in zip(host.logprobs, device.logprobs, strict=True):
            for token, value in other.items():
                assert mine[token].rank == value.rank
                # Steps of another shape round otherwise.
                assert mine[token].logprob == pytest.approx(value.logprob, abs=5e-5)
        assert host.cumulative_logprob == pytest.approx(device.cumulative_logprob, abs=1e-3)


def unchanged(req_id: int, logits: Logits, token_ids: Any, stream_ptr: Any, client_id: Any) -> None:
    """StepEdits nothing, but has the host draw."""


class Adding(LogitsProcessor):
    """Adds to one id, and remembers what it saw."""

    def __init__(self, token: int, much: float) -> None:
        self.token, self.much = token, much
        self.seen: list[tuple[int, Logits, list[int]]] = []

    def __call__(
        self, req_id: int, logits: Logits, token_ids: list[list[int]], stream_ptr: Any, client_id: Any
    ) -> None:
        (tokens,) = token_ids
        self.seen.append((req_id, logits.copy(), tokens))
        logits[..., self.token] += self.much


class TestProcessors:
    PROMPT = ids(9, 31)

    def test_it_sees_the_models_logits_and_all_ids(self, llm: LLM, logits_by_transformers: LogitsAfter) -> None:
        processor = Adding(65, 4.0)
        output = llm.generate(self.PROMPT, free(logits_processor=processor, repetition_penalty=1.3))
        tokens = [*self.PROMPT, *output.outputs[0].token_ids]
        assert [(req_id, seen) for req_id, _, seen in processor.seen] == [
            (output.request_id, tokens[:length]) for length in range(len(self.PROMPT), len(tokens))
        ]
        found = np.stack([logits for _, logits, _ in processor.seen])
        assert found.shape == (20, 1, 1, VOCAB)
        np.testing.assert_allclose(found[:, 0, 0], logits_by_transformers(tokens)[len(self.PROMPT) - 1 : -1], atol=1e-4)

    def test_several_are_called_in_order(self, llm: LLM, logits_by_transformers: LogitsAfter) -> None:
        first, last = Adding(70, 3.0), Adding(71, 3.0)

        def halve_then_forbid(req_id: int, logits: Logits, token_ids: Any, stream_ptr: Any, client_id: Any) -> None:
            logits /= 2
            logits[..., token_ids[0][-1]] = -np.inf

        def change(logits: Logits, tokens: list[int]) -> None:
            logits[70] += 3
            logits /= 2
            logits[tokens[-1]] = -np.inf
            logits[71] += 3

        found = tokens_of(llm, self.PROMPT, logits_processor=[first, halve_then_forbid, last])
        assert found == greedily(logits_by_transformers, self.PROMPT, change)
        assert {70, 71} & set(found)
        np.testing.assert_allclose(last.seen[0][1][0, 0, 70], (first.seen[0][1][0, 0, 70] + 3) / 2)

    def test_a_batched_one_is_called_once_a_step(self, llm: LLM) -> None:
        DOUBLED.calls.clear()
        doubled = {"temperature": 1.0, "seed": 5, "apply_batched_logits_processor": True}
        outputs = llm.generate([self.PROMPT, "other", "plain"], [free(**doubled), free(**doubled), free()])
        by_temperature = [tokens_of(llm, one, temperature=0.5, seed=5) for one in (self.PROMPT, "other")]
        assert [output.outputs[0].token_ids for output in outputs[:2]] == by_temperature
        numbers = [output.request_id for output in outputs]
        assert {number for call in DOUBLED.calls for number in call} == set(numbers[:2])
        assert numbers[:2] in DOUBLED.calls
        assert len(DOUBLED.calls) < 40

    def test_a_batched_one_comes_before_a_sequences_own(self, llm: LLM, logits_by_transformers: LogitsAfter) -> None:
        own = Adding(65, 0.0)
        llm.generate(self.PROMPT, free(apply_batched_logits_processor=True, logits_processor=own, max_tokens=1))
        np.testing.assert_allclose(own.seen[0][1][0, 0], 2 * logits_by_transformers(self.PROMPT)[-1], atol=1e-3)

    def test_without_a_batched_one_it_cannot_be_asked_for(self, tiny_llama: Path) -> None:
        with pytest.raises(ValueError, match=r"LLM\.batched_logits_processor = 5 is invalid: it should be callable"):
            make(tiny_llama, batched_logits_processor=5)

    def test_it_may_abort_its_request(self, llm: LLM) -> None:
        outputs: list[Any] = []
        there = threading.Event()

        def abort(req_id: int, logits: Logits, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
            if len(token_ids[0]) == len(self.PROMPT) + 3 and there.wait(60):
                outputs[0].abort()

        outputs.append(llm.generate_async(self.PROMPT, free(logits_processor=abort, max_tokens=100)))
        there.set()
        output = outputs[0].result(timeout=60).outputs[0]
        assert (output.finish_reason, output.length) == ("cancelled", 4)


def raising(req_id: int, logits: Logits, token_ids: Any, stream_ptr: Any, client_id: Any) -> None:
    if len(token_ids[0]) > 15:
        raise KeyError("a fault of the user's")


def filling(value: float) -> Any:
    def fill(req_id: int, logits: Logits, token_ids: Any, stream_ptr: Any, client_id: Any) -> None:
        logits[:] = value

    return fill


class TestFailures:
    @pytest.mark.parametrize(
        ("arguments", "error", "says"),
        [
            ({"logits_processor": raising}, KeyError, "a fault of the user's"),
            ({"logits_processor": filling(np.nan)}, ValueError, "NaN"),
            ({"logits_processor": filling(np.inf)}, ValueError, "NaN or \\+inf"),
            ({"logits_processor": filling(-np.inf)}, ValueError, "no token is left"),
            ({"bad_token_ids": [*range(VOCAB)]}, ValueError, "no token is left"),
            ({"logits_processor": lambda: None}, TypeError, "argument"),
            ({"logits_processor": [unchanged, raising], "n": 3, "temperature": 1.0}, KeyError, "a fault"),
        ],
    )
    def test_a_fault_is_its_own_requests_only(
        self, llm: LLM, arguments: dict[str, Any], error: type[Exception], says: str
    ) -> None:
        others = [free(), free(repetition_penalty=1.3), free(temperature=1.0, seed=9, logits_processor=unchanged)]
        alone = [llm.generate(ids(9), params).outputs[0].token_ids for params in others]
        running = [llm.generate_async(ids(9), params) for params in others[:2]]
        failing = llm.generate_async(ids(9), free(max_tokens=100, **arguments), streaming=True)
        running.append(llm.generate_async(ids(9), others[2]))
        with pytest.raises(error, match=says):
            for _ in failing:
                pass
        with pytest.raises(error, match=says):
            failing.result(timeout=60)
        assert failing.error is not None
        assert [one.result(timeout=60).outputs[0].token_ids for one in running] == alone

    def test_the_other_samples_end_with_a_failed_one(self, llm: LLM) -> None:
        left = iter(range(12))

        def raise_once(req_id: int, logits: Logits, token_ids: Any, stream_ptr: Any, client_id: Any) -> None:
            if next(left, None) == 11:
                raise KeyError("once")

        params = free(n=3, temperature=1.0, max_tokens=140, logits_processor=raise_once)
        with pytest.raises(KeyError, match="once"):
            llm.generate("x", params)
        assert tokens_of(llm, "y", repetition_penalty=1.2)
        assert llm.get_stats()[-1]["numActiveRequests"] == 0

    def test_a_batched_fault_fails_those_that_asked(self, llm: LLM, greedy_by_transformers: Any) -> None:
        DOUBLED.fails = True
        try:
            asking = [llm.generate_async(ids(9), free(apply_batched_logits_processor=True)) for _ in range(2)]
            assert tokens_of(llm, ids(9)) == greedy_by_transformers(ids(9), 20)
            for output in asking:
                with pytest.raises(ArithmeticError, match="no more doubling"):
                    output.result(timeout=60)
        finally:
            DOUBLED.fails = False


MIXED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2, "frequency_penalty": 1.0, "logprobs": 2},
    {"top_p": 0.9, "top_p_decay": 0.8, "seed": 3},
    {"logprobs": 1},
    {"return_generation_logits": True, "prompt_logprobs": 1},
    {"return_context_logits": True, "no_repeat_ngram_size": 2, "min_tokens": 5},
]


class TestTogether:
    def test_each_gets_what_it_gets_alone(self, llm: LLM) -> None:
        prompts = [ids(5 + 9 * index, 40 + index) for index in range(len(MIXED))]
        params = [free(max_tokens=10 + index, **arguments) for index, arguments in enumerate(MIXED)]
        alone = [llm.generate(prompt, each).outputs[0] for prompt, each in zip(prompts, params, strict=True)]
        crowd = [output.outputs[0] for output in llm.generate(prompts, params)]
        assert [one.token_ids for one in crowd] == [one.token_ids for one in alone]
        assert [len(one.logprobs) for one in crowd] == [0, 0, 0, 13, 0, 15, 0, 0]

    def test_samples_with_edits(self, llm: LLM) -> None:
        arguments = {"temperature": 1.0, "presence_penalty": 2.0, "max_tokens": 10}
        samples = llm.generate(ids(21), free(n=5, seed=7, **arguments)).outputs
        alone = [tokens_of(llm, ids(21), seed=7 + index, **arguments) for index in range(5)]
        assert [sample.token_ids for sample in samples] == alone
        assert len(set(map(tuple, alone))) == 5

    def test_a_stream_with_edits(self, llm: LLM) -> None:
        params = free(n=2, temperature=1.0, seed=7, repetition_penalty=1.2, logprobs=1)
        whole = llm.generate("stream", params).outputs
        text, tokens, steps = ["", ""], [[], []], 0
        with held(llm, after=FIRST_TOKENS) as go_on:
            for output in llm.generate("stream", params, streaming=True):
                for index, sample in enumerate(output.outputs):
                    text[index] += sample.text_diff
                    tokens[index] += sample.token_ids_diff
                steps += 1
                go_on.set()
        assert text == [sample.text for sample in whole]
        assert tokens == [sample.token_ids for sample in whole]
        assert steps > 1

    def test_an_abort_in_the_middle_frees_the_pages(self, llm: LLM) -> None:
        params = free(max_tokens=120, repetition_penalty=1.2)
        with held(llm, after=4):
            output = llm.generate_async(ids(20), params, streaming=True)
            next(output)
            output.abort()
        sample = output.result(timeout=60).outputs[0]
        assert sample.finish_reason == "cancelled"
        assert 0 < sample.length < 120
        assert tokens_of(llm, "x", max_tokens=1)
        llm.get_stats()
        assert tokens_of(llm, "y", max_tokens=2)
        assert llm.get_stats()[-1]["kvCacheStats"]["usedNumBlocks"] <= 1

    @pytest.mark.slow
    def test_stopped_and_computed_again(self, llm: LLM, tiny_llama: Path, logits_by_transformers: LogitsAfter) -> None:
        prompts = [ids(n, n) for n in (30, 35, 40, 33)]
        params = [
            free(max_tokens=40),
            free(max_tokens=40, repetition_penalty=1.3, return_generation_logits=True),
            free(max_tokens=40, temperature=1.0, seed=1, frequency_penalty=0.5),
            free(max_tokens=40, return_context_logits=True, prompt_logprobs=2, min_tokens=3),
        ]
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        with make(
            tiny_llama,
            kv_cache_config=KvCacheConfig(max_tokens=160, tokens_per_block=8),
            scheduler_config=SchedulerConfig(capacity_scheduler_policy="MAX_UTILIZATION"),
        ) as narrow:
            outputs = narrow.generate(prompts, params)
            assert narrow.get_stats()[-1]["inflightBatchingStats"]["numPausedRequests"] > 0
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert outputs[1].outputs[0].generation_logits.shape == (40, VOCAB)
        logits = logits_by_transformers(prompts[3])
        np.testing.assert_allclose(outputs[3].context_logits, logits, atol=1e-4)
        sample = outputs[3].outputs[0]
        check_prompt_logprobs(sample.prompt_logprobs, prompts[3], sample.token_ids[0], logits, 2)


class TestInputInOutput:
    @pytest.mark.parametrize("edits", [{}, {"repetition_penalty": 1.2, "logprobs": 1}])
    def test_ids_and_text_begin_with_the_prompt(self, llm: LLM, edits: dict[str, Any]) -> None:
        bare = llm.generate("Hello", free(**edits)).outputs[0]
        full = llm.generate("Hello", free(exclude_input_from_output=False, **edits))
        sample = full.outputs[0]
        assert sample.token_ids == full.prompt_token_ids + bare.token_ids
        assert sample.text == "Hello" + bare.text
        assert (sample.length, sample.logprobs) == (20, bare.logprobs)

    def test_a_stream_adds_what_was_generated(self, llm: LLM) -> None:
        bare = llm.generate("Hello", free()).outputs[0]
        text, tokens = "", []
        for output in llm.generate("Hello", free(exclude_input_from_output=False), streaming=True):
            text += output.outputs[0].text_diff
            tokens += output.outputs[0].token_ids_diff
            assert output.outputs[0].text == "Hello" + text
        assert (text, tokens) == (bare.text, bare.token_ids)

    @pytest.mark.parametrize(
        ("prompt", "arguments", "text"),
        [
            (list(b"abc"), {}, None),
            ("abcdef", {"truncate_prompt_tokens": 2}, "ef"),
            ("abc", {"detokenize": False}, ""),
            ([*b"abc"], {"detokenize": False}, ""),
        ],
    )
    def test_the_text_is_that_of_the_ids(
        self, llm: LLM, prompt: Any, arguments: dict[str, Any], text: str | None
    ) -> None:
        output = llm.generate(prompt, free(exclude_input_from_output=False, n=2, temperature=1.0, seed=1, **arguments))
        assert llm.tokenizer is not None
        begins = llm.tokenizer.decode(output.prompt_token_ids) if text is None else text
        for sample in output.outputs:
            assert sample.text.startswith(begins)
            assert sample.token_ids[: len(output.prompt_token_ids)] == output.prompt_token_ids
            assert sample.length == 20
        assert bool(output.outputs[0].text) == arguments.get("detokenize", True)


class TestText:
    def test_what_concerns_beams_and_padding_changes_nothing(self, llm: LLM) -> None:
        more = {"length_penalty": 2.0, "pad_id": 3, "spaces_between_special_tokens": False}
        assert tokens_of(llm, "a", **more) == tokens_of(llm, "a")

    @pytest.mark.parametrize("skip", [True, False])
    def test_special_tokens_in_the_text(self, llm: LLM, skip: bool) -> None:
        assert llm.tokenizer is not None
        assert SPECIAL in llm.tokenizer.hf.all_special_ids
        only = np.full(VOCAB, -np.inf)
        only[SPECIAL] = 0
        output = llm.generate("a", free(embedding_bias=only, max_tokens=4, skip_special_tokens=skip)).outputs[0]
        assert output.token_ids == [SPECIAL] * 4
        assert output.text == ("" if skip else llm.tokenizer.decode([SPECIAL], skip_special_tokens=False) * 4)

    @pytest.mark.parametrize("include", [True, False])
    def test_a_stop_string_of_edited_text(self, llm: LLM, include: bool) -> None:
        params = free(max_tokens=60, repetition_penalty=1.2)
        whole = llm.generate("go", params).outputs[0]
        stop = whole.text[20:23]
        params = free(max_tokens=60, repetition_penalty=1.2, stop=stop, include_stop_str_in_output=include)
        output = llm.generate("go", params).outputs[0]
        end = whole.text.index(stop) + (len(stop) if include else 0)
        assert output.text == whole.text[:end]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
