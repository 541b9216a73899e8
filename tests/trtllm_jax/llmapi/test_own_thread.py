"""Users' functions run in the engine's thread, which cannot wait for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtllm_jax import LLM, SamplingParams

from ..tiny_engine import tiny_engine

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


def answer_with(llm: LLM, call: Callable[[], object]) -> Any:
    params = SamplingParams(max_tokens=3, ignore_eos=True, logits_processor=lambda *_: call())
    return llm.generate_async([1, 2], params).result(timeout=120)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Any:
    with tiny_engine(tiny_llama) as llm:
        yield llm


@pytest.mark.parametrize("name", ["generate", "embed", "a result that is waited for", "update_weights"])
def test_what_would_wait_for_ever_is_refused(llm: LLM, name: str) -> None:
    pending = llm.generate_async([5], SamplingParams(max_tokens=100, ignore_eos=True))
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: llm.generate([3], GREEDY),
        "embed": lambda: llm.embed([3]),
        "a result that is waited for": pending.result,
        "update_weights": lambda: llm.update_weights(llm.params),
    }
    with pytest.raises(RuntimeError, match="engine's own thread"):
        answer_with(llm, calls[name])
    assert pending.result(timeout=120).outputs[0].length == 100
    assert llm.generate([3], GREEDY).outputs[0].length == 4


def test_what_does_not_wait_is_done(llm: LLM) -> None:
    pending = llm.generate_async([5], SamplingParams(max_tokens=100, ignore_eos=True))
    finished = llm.generate([3], GREEDY)
    answer = answer_with(llm, lambda: (pending.abort(), finished.result(), llm.get_stats()))
    assert answer.outputs[0].length == 3
    assert pending.result(timeout=120).outputs[0].finish_reason in ("cancelled", "length")


def test_a_shutdown_is_done_after_the_step(tiny_llama: Path) -> None:
    llm = tiny_engine(tiny_llama)
    beside = llm.generate_async([5], SamplingParams(max_tokens=140, ignore_eos=True))
    assert answer_with(llm, llm.shutdown).outputs[0].finish_reason == "cancelled"
    assert beside.result(timeout=120).finished
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shutting down"):
        llm.generate([1], GREEDY)


def test_another_engine_may_be_asked(llm: LLM, tiny_llama: Path) -> None:
    with tiny_engine(tiny_llama) as other:
        expected = other.generate([3], GREEDY).outputs[0].token_ids
        found: list[Any] = []
        answer_with(llm, lambda: found.append(other.generate([3], GREEDY).outputs[0].token_ids))
    assert found == [expected] * 3


def test_the_last_reference_may_go_where_the_engines_lock_is_held(tiny_llama: Path) -> None:
    """The garbage collector may run anywhere: it waits for nothing, and takes no lock."""
    llm = tiny_engine(tiny_llama)
    engine = llm._engine
    pending = llm.generate_async([5], SamplingParams(max_tokens=140, ignore_eos=True))
    with engine._lock:
        del llm
    assert pending.result(timeout=120).finished
    engine._thread.join(120)
    assert not engine._thread.is_alive()
    assert not [thread for thread in threading.enumerate() if thread is engine._thread]


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_what_would_end_a_program_ends_its_own_request(llm: LLM, raised: BaseException) -> None:
    def processor(*_: Any) -> None:
        raise raised

    beside = llm.generate_async([5], SamplingParams(max_tokens=30, ignore_eos=True))
    with pytest.raises(RuntimeError, match=type(raised).__name__):
        answer_with(llm, lambda: processor())
    assert beside.result(timeout=120).outputs[0].length == 30
    assert llm.generate([3], GREEDY).outputs[0].length == 4
