"""Logits and log-probabilities that are returned, against transformers."""

import threading
from typing import Any

import numpy as np
import pytest

from trtllm_jax import LLM

from .sampled import VOCAB, LogitsAfter, check_prompt_logprobs, free, ids, tokens_of, unchanged


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
