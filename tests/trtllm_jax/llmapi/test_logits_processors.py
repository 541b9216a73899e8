"""Logits processors of the user's own, alone and of batches, and what fails with them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_jax import LLM
from trtllm_jax.sampling_params import BatchedLogitsProcessor, LogitsProcessor

from ..tiny_engine import tiny_engine
from .sampled import VOCAB, Logits, LogitsAfter, free, greedily, ids, tokens_of, unchanged


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


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama, batched_logits_processor=DOUBLED) as llm:
        yield llm


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
            tiny_engine(tiny_llama, batched_logits_processor=5)

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
