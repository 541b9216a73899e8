"""Embeddings of prompts, against transformers; and what an output knows of its request's way."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_jax import LLM, SamplingParams

from ..tiny_engine import CACHE, LENGTH, tiny_engine

PAGE = CACHE["tokens_per_block"]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama) as llm:
        yield llm


@pytest.fixture(scope="module")
def by_transformers(tiny_torch: Any) -> Callable[[list[int]], np.ndarray]:
    import torch

    def embedding(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            last = tiny_torch.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return (last / last.norm()).numpy()

    return embedding


def some_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


class TestEmbeddings:
    def test_of_prompts_of_all_lengths_equal_transformers(
        self, llm: LLM, by_transformers: Callable[[list[int]], np.ndarray]
    ) -> None:
        prompts = [some_ids(length, length) for length in (1, 7, 8, 31, 33, 100, 150)]
        for prompt, output in zip(prompts, llm.embed(prompts), strict=True):
            assert output.embedding.dtype == np.float32
            np.testing.assert_allclose(output.embedding, by_transformers(prompt), atol=2e-5)
            assert output.outputs[0].token_ids == []
            assert output.finished

    def test_with_a_prefix_from_the_cache(self, llm: LLM, by_transformers: Callable[[list[int]], np.ndarray]) -> None:
        prompt = some_ids(60, 77)
        first, again = llm.embed(prompt), llm.embed(prompt)
        assert (first.cached_tokens, again.cached_tokens) == (0, 56)
        np.testing.assert_allclose(again.embedding, by_transformers(prompt), atol=2e-5)

    def test_beside_generation(
        self, llm: LLM, by_transformers: Callable[[list[int]], np.ndarray], greedy_by_transformers: Any
    ) -> None:
        prompts = [some_ids(length, 200 + length) for length in (12, 40, 70)]
        going = [llm.generate_async(prompt, SamplingParams(max_tokens=40, ignore_eos=True)) for prompt in prompts]
        found = [llm.embed_async(prompt) for prompt in prompts]
        for prompt, output in zip(prompts, found, strict=True):
            np.testing.assert_allclose(output.result(60).embedding, by_transformers(prompt), atol=2e-5)
        for prompt, output in zip(prompts, going, strict=True):
            assert output.result(60).outputs[0].token_ids == greedy_by_transformers(prompt, 40)
            assert output.embedding is None

    def test_texts_and_truncation(self, llm: LLM, by_transformers: Callable[[list[int]], np.ndarray]) -> None:
        text = "a text of some length"
        whole = llm.embed(text)
        np.testing.assert_allclose(whole.embedding, by_transformers(whole.prompt_token_ids), atol=2e-5)
        short = llm.embed(text, truncate_prompt_tokens=5)
        assert short.prompt_token_ids == whole.prompt_token_ids[-5:]
        np.testing.assert_allclose(short.embedding, by_transformers(short.prompt_token_ids), atol=2e-5)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [([], "empty list"), ([[]], "list of int"), ([[1, 999]], "holds 999"), (some_ids(LENGTH), f"{LENGTH} tokens")],
    )
    def test_what_cannot_be_embedded_is_refused(self, llm: LLM, inputs: Any, message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            llm.embed(inputs)

    def test_one_at_a_time_where_nobody_waits(self, llm: LLM) -> None:
        with pytest.raises(TypeError, match="embed_async takes one prompt"):
            llm.embed_async(["a", "b"])  # type: ignore[arg-type]


class TestMetrics:
    def test_add_up(self, llm: LLM) -> None:
        output = llm.generate(some_ids(20, 5), SamplingParams(max_tokens=30, ignore_eos=True))
        found = output.metrics_dict
        assert 0 <= found["request_queue_time"] <= found["ttft"] <= found["e2e"]
        assert found["tpot"] == pytest.approx((found["e2e"] - found["ttft"]) / 29)

    def test_time_in_the_queue_counts(self, llm: LLM) -> None:
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        outputs = [llm.generate_async(some_ids(20, seed), params) for seed in range(5)]
        *running, queued = [output.result(60).metrics_dict for output in outputs]
        assert queued["request_queue_time"] > 0.5 * min(each["e2e"] for each in running)
        assert queued["ttft"] >= queued["request_queue_time"]

    def test_cached_tokens_are_the_pages_that_were_known(self, llm: LLM) -> None:
        prompt, more = some_ids(24, 9), some_ids(10, 10)
        params = SamplingParams(max_tokens=4, ignore_eos=True, n=2, temperature=1.0, seed=1)
        assert llm.generate(prompt, params).cached_tokens == 0
        assert llm.generate(prompt + more, params).cached_tokens == 24

    def test_nothing_is_known_before_it_happened(self, llm: LLM) -> None:
        output = llm.generate_async(some_ids(4), SamplingParams(max_tokens=150, ignore_eos=True), streaming=True)
        assert "e2e" not in output.metrics_dict
        next(output)
        assert {"request_queue_time", "ttft"} == set(output.metrics_dict)
        output.abort()
        output.result(20)
        assert output.metrics_dict["e2e"] >= output.metrics_dict["ttft"]
