"""The engine's loop over a real model: its order, its clock, and which programs it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels.devices import Platform
from trtllm_jax import LLM, SamplingParams
from trtllm_jax.engine.config import decode_buckets, token_buckets
from trtllm_jax.engine.kv_cache import CacheSpec
from trtllm_jax.engine.program_table import draw_for
from trtllm_jax.engine.runner import Runner
from trtllm_jax.engine.steps import Draw

from ..tiny_engine import tiny_engine

LONG = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama) as llm:
        llm.warm_up()
        yield llm


def order_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is dispatched (d) and what is read (r), in order, for one long answer."""
    seen: list[str] = []
    for name, letter in (("run", "d"), ("read", "r")):
        original = getattr(Runner, name)

        def noted(self: Runner, *args: Any, letter: str = letter, original: Any = original) -> Any:
            seen.append(letter)
            return original(self, *args)

        monkeypatch.setattr(Runner, name, noted)
    llm.generate([1, 2, 3], LONG)
    return "".join(seen)


def test_a_step_is_dispatched_before_the_one_before_it_is_read(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert order_of(llm, monkeypatch)[:8] == "ddrdrdrd"


def test_unless_that_is_disabled(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_engine(tiny_llama, disable_overlap_scheduler=True) as llm:
        assert order_of(llm, monkeypatch)[:8] == "drdrdrdr"


def test_the_iterations_last_as_long_as_the_engine_was_busy(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run, pause = Runner.run, 0.01

    def slow(self: Runner, dispatches: Any) -> Any:
        results = run(self, dispatches)
        time.sleep(pause)
        return results

    monkeypatch.setattr(Runner, "run", slow)
    llm.get_stats()
    began = time.perf_counter()
    llm.generate([1, 2, 3], LONG)
    seconds = time.perf_counter() - began
    latencies = [record["iterLatencyMS"] / 1e3 for record in llm.get_stats()]
    assert len(latencies) >= 8
    assert pause * len(latencies) <= sum(latencies) <= seconds


def test_new_weights_wait_for_the_step_that_reads_the_old(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params, returned, standing, go_on = llm.params, threading.Event(), threading.Event(), threading.Event()
    runner = llm._engine._runner
    run = runner.run

    def gated(dispatches: Any) -> Any:
        standing.set()
        assert go_on.wait(120)
        return run(dispatches)

    monkeypatch.setattr(runner, "run", gated)
    output = llm.generate_async([1, 2, 3], LONG)
    assert standing.wait(120)
    thread = threading.Thread(target=lambda: (llm.update_weights(params), returned.set()))
    thread.start()
    # The engine stands still: however long this takes, a call that waits for it cannot have returned.
    assert not returned.wait(0.5)
    go_on.set()
    thread.join(120)
    assert returned.is_set()
    output.result()


class TestPrograms:
    def test_a_step_takes_the_smallest_that_holds_it(self, llm: LLM) -> None:
        programs = llm._engine._runner._programs
        for tokens in range(1, 33):
            fitting = [size for size in programs.sizes.token_buckets if size >= tokens]
            assert programs.ragged(tokens) == ("ragged", min(fitting))
        for rows in range(1, 5):
            fitting = [size for size in programs.sizes.row_buckets if size >= rows]
            assert programs.decode(rows, greedy=True, extras=0)[:2] == ("decode", min(fitting))

    def test_sizes_grow_up_to_the_largest(self) -> None:
        for sizes in (token_buckets(500, Platform("cpu")), token_buckets(500, Platform("gpu")), decode_buckets(100)):
            assert list(sizes) == sorted(set(sizes))
        assert token_buckets(500, Platform("gpu"))[-1] == 500
        assert decode_buckets(100)[-1] == 100

    @pytest.mark.parametrize(
        ("rows", "greedy", "extras", "how"),
        [
            (64, True, 0, Draw(False, 0)),
            (64, False, 0, Draw(True, 0)),
            (64, True, 1, Draw(True, 8)),
            (64, False, 8, Draw(True, 8)),
            (64, True, 9, Draw(True, 64)),
            (4, True, 1, Draw(True, 4)),
        ],
    )
    def test_a_gpus_programs_do_what_their_rows_need(self, rows: int, greedy: bool, extras: int, how: Draw) -> None:
        assert draw_for(False, rows, greedy, extras) == how

    def test_without_enough_compiled_a_request_waits_for_its_own(self, tiny_llama: Path) -> None:
        with tiny_engine(tiny_llama, enforce_eager=True) as llm:
            programs = llm._engine._runner._programs
            assert not any(programs._compiler.ready(("ragged", size)) for size in programs.sizes.token_buckets)
            eager = llm.generate([1, 2, 3], LONG).outputs[0].token_ids
            assert programs._compiler.ready(("ragged", programs.sizes.token_buckets[0]))
            assert not programs._compiler.ready(("copy", 0))
            llm.warm_up()
            assert programs._compiler.ready(("copy", 0))
            assert llm.generate([1, 2, 3], LONG).outputs[0].token_ids == eager

    def test_after_the_end_nothing_is_compiled_and_nobody_waits_for_it(self, tiny_llama: Path) -> None:
        with tiny_engine(tiny_llama, enforce_eager=True) as llm:
            pass
        with pytest.raises(RuntimeError, match="shutting down"):
            llm.warm_up()

    def test_a_start_that_fails_leaves_no_compilation_behind(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def compiling() -> set[threading.Thread]:
            return {thread for thread in threading.enumerate() if thread.name == "trtllm_jax-compiler"}

        def full(self: CacheSpec, *args: Any) -> Any:
            raise MemoryError("no room for the cache")

        monkeypatch.setattr(CacheSpec, "allocate", full)
        before = compiling()
        with pytest.raises(MemoryError, match="no room"):
            tiny_engine(tiny_llama)
        assert compiling() <= before
