"""What is the user's and what the engine's: neither sees the other change it, and nothing is kept when it has ended."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm_jax import LLM, SamplingParams
from trtllm_jax.requests.outputs import Delta, Logprob, RequestOutput

from ..tiny_engine import held, tiny_engine

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama) as llm:
        yield llm


def greedy(tokens: int = 20, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **more)


def shown(output: RequestOutput) -> list[Any]:
    return [output.prompt_token_ids, output.cached_tokens, *(vars(one) for one in output.outputs)]


def test_an_output_may_be_changed_while_it_is_filled(llm: LLM) -> None:
    expected = llm.generate(PROMPT, greedy(logprobs=1)).outputs[0]
    beside = llm.generate_async([9, 8], greedy())
    for output in llm.generate(PROMPT, greedy(logprobs=1, n=1), streaming=True):
        output.prompt_token_ids += [7] * 50
        output.prompt_token_ids.clear()
        for given in output.outputs[0].logprobs:
            given.clear()
        output.outputs[0].token_ids_diff.append(5)
    assert output.outputs[0].token_ids == expected.token_ids
    assert beside.result().outputs[0].token_ids == llm.generate([9, 8], greedy()).outputs[0].token_ids


def test_samples_of_one_prompt_share_nothing(llm: LLM) -> None:
    output = llm.generate(PROMPT, greedy(n=2, temperature=1.0, seed=1, prompt_logprobs=1, logprobs=1))
    first, second = output.outputs
    before = copy.deepcopy(vars(second))
    for given in (*first.prompt_logprobs, *first.logprobs):
        given.clear()
    first.token_ids.clear()
    assert vars(second) == before


def test_what_was_given_may_be_changed_at_once(llm: LLM) -> None:
    bias, prompt, stops = np.zeros(258, np.float32), list(PROMPT), [3]
    params = greedy(embedding_bias=bias, stop_token_ids=stops, return_generation_logits=True)
    expected = llm.generate(list(prompt), greedy(stop_token_ids=[3], return_generation_logits=True))
    with held(llm) as go_on:
        output = llm.generate_async(prompt, params)
        prompt.clear()
        bias[:] = -np.arange(258)
        stops.append(expected.outputs[0].token_ids[1])
        params.max_tokens, params.include_stop_str_in_output, params.return_generation_logits = 1, True, False
        go_on.set()
        output.result()
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    np.testing.assert_allclose(output.outputs[0].generation_logits, expected.outputs[0].generation_logits, atol=1e-5)


@pytest.mark.parametrize("copied", [lambda each: pickle.loads(pickle.dumps(each)), copy.deepcopy, copy.copy])
def test_a_finished_output_is_data(llm: LLM, copied: Any) -> None:
    params = greedy(n=2, temperature=1.0, seed=1, logprobs=1, return_context_logits=True)
    output = llm.generate(PROMPT, params)
    other = copied(output)
    assert shown(other) == shown(output)
    np.testing.assert_array_equal(other.context_logits, output.context_logits)
    assert other.result() is other
    assert other.metrics_dict == output.metrics_dict
    other.abort()


def test_a_copy_of_an_unfinished_output_stays_what_it_was(llm: LLM) -> None:
    output = llm.generate(PROMPT, greedy(60), streaming=True)
    copies = [copy.deepcopy(next(output))]
    copies += [copy.deepcopy(each) for each in output]
    lengths = [each.outputs[0].length for each in copies]
    assert lengths == sorted(set(lengths))
    assert (lengths[-1], copies[-1].finished, copies[0].finished) == (60, True, False)
    with pytest.raises(RuntimeError, match="is not updated"):
        copies[0].result()


@pytest.mark.parametrize("copied", [lambda each: pickle.loads(pickle.dumps(each)), copy.deepcopy, copy.copy])
@pytest.mark.parametrize("copy_first", [True, False])
def test_an_output_and_its_copy_are_filled_apart(copied: Any, copy_first: bool) -> None:
    """Both begin with a token that was taken and one that arrived; only what was copied gets a third."""
    output = RequestOutput(1, None, list(PROMPT), 1, lambda: None)
    logprobs = [{token: Logprob(-1.0, 1)} for token in (7, 8, 9)]
    output._deliver(Delta(0, "a", [7], logprobs[:1]))
    next(output)
    output._deliver(Delta(0, "b", [8], logprobs[1:2]))
    other = copied(output)
    output._deliver(Delta(0, "c", [9], logprobs[2:], "length"))
    other.prompt_token_ids.append(6)
    for each in (other, output) if copy_first else (output, other):
        next(each)
    one, two = output.outputs[0], other.outputs[0]
    assert (one.text, one.token_ids, one.cumulative_logprob, output.finished) == ("abc", [7, 8, 9], -3.0, True)
    assert (two.text, two.token_ids, two.cumulative_logprob, other.finished) == ("ab", [7, 8], -2.0, False)
    assert (len(one.logprobs), len(two.logprobs)) == (3, 2)
    assert output.prompt_token_ids == PROMPT


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"n": 2, "temperature": 1.0, "logprobs": 2, "prompt_logprobs": 1},
        {"repetition_penalty": 1.2},
        {"bad_token_ids": [1], "logits_processor": lambda *_: None},
        {"logits_processor": lambda *_: 1 / 0},
    ],
    ids=["plain", "samples", "penalty", "function", "failure"],
)
def test_what_has_ended_is_freed_at_once(llm: LLM, wishes: dict[str, Any]) -> None:
    llm.generate([1], greedy(1))
    gc.collect()
    gc.disable()
    try:
        output = llm.generate_async(PROMPT, greedy(**wishes))
        with contextlib.suppress(ZeroDivisionError):
            output.result()
        ended = weakref.ref(output)
        del output
        # Whatever the engine's threads still had of it they let go when they come to wait.
        llm.generate([1], greedy(1))
        assert ended() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("stop", [None, "stop string"])
def test_what_was_ended_from_outside_is_freed_at_once(llm: LLM, stop: str | None) -> None:
    answer = llm.generate([1], greedy(30)).outputs[0].text
    gc.collect()
    gc.disable()
    try:
        with held(llm) as go_on:
            output = llm.generate_async([1], greedy(140, stop=stop and answer[3:6]))
            if stop is None:
                output.abort()
            go_on.set()
            assert output.result().outputs[0].finish_reason == ("stop" if stop else "cancelled")
        ended = weakref.ref(output)
        del output
        for _ in range(2):  # the engine hears of a stop string a step later, and is done with that after the next
            llm.generate([1], greedy(1))
        assert ended() is None
    finally:
        gc.enable()


def test_each_request_without_a_seed_draws_anew(llm: LLM, tiny_llama: Path) -> None:
    drawn = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
    with tiny_engine(tiny_llama) as other:  # as in a second frontend
        answers = [one.generate(PROMPT, drawn).outputs[0].token_ids for one in (llm, llm, other, other)]
    assert len({tuple(answer) for answer in answers}) == 4
