"""Requests of every kind together, against the same requests alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_jax import LLM
from trtllm_jax.llmapi import KvCacheConfig, SchedulerConfig

from ..tiny_engine import FIRST_TOKENS, held, tiny_engine
from .sampled import VOCAB, LogitsAfter, check_prompt_logprobs, free, ids, tokens_of

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
        with tiny_engine(
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
