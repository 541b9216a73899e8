"""A fault at any line of the scheduler, the runner or what they call: everybody who waits hears of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax.numpy as jnp
import pytest

from trtllm_jax import engine as engine_package
from trtllm_jax.common.errors import EngineDeadError
from trtllm_jax.engine import weights
from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.config import Compilation
from trtllm_jax.engine.engine import Engine
from trtllm_jax.engine.kv_cache import CacheSpec
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.request import FinishReason, Request, Update
from trtllm_jax.engine.runner import Runner
from trtllm_jax.engine.sampling import Sampling
from trtllm_jax.engine.scheduler import CapacityPolicy, Scheduler, SchedulerLimits
from trtllm_jax.llmapi.llm_args import parse_llm_args
from trtllm_jax.llmapi.loading import load

SECONDS = 60
"""Far more than any of this takes: who is told nothing by then is never told."""
LIMITS = SchedulerLimits(max_batch_size=4, max_num_tokens=16, max_seq_len=32, max_decode_steps=4)
PAGE_SIZE, PAGES = 4, 24
SEARCHED = {
    *(
        "scheduler.py",
        "block_pool.py",
        "plan.py",
        "request.py",
        "runner.py",
        "programs.py",
        "compiler.py",
        "packing.py",
    ),
    *("row_state.py", "penalties.py", "step_edits.py", "edit_list.py", "host_sampling.py"),
}
FOLDER = str(Path(engine_package.__file__).parent)
Line = tuple[str, int]


class Parts:
    """Compiled programs and weights of a tiny model, for as many engines as are wanted."""

    def __init__(self, folder: Path) -> None:
        loaded = load(parse_llm_args(model=folder, dtype="float32"))
        self.params, self.mesh = loaded.params, loaded.mesh
        (group,) = loaded.model.module.cache_spec(loaded.model.config)
        self.spec = CacheSpec(group, PAGE_SIZE, jnp.dtype("float32"))
        shapes = weights.shapes_of(self.params)
        self.programs = Programs(
            loaded.model, self.mesh, shapes, self.spec.arrays(PAGES, self.mesh), LIMITS, LIMITS.max_seq_len // PAGE_SIZE
        )
        self.programs.compile(Compilation.BEFORE, lambda done, total: None)

    def engine(self, sink: Callable[[Sequence[Update]], None]) -> Engine:
        scheduler = Scheduler(LIMITS, BlockPool(PAGES, PAGE_SIZE), CapacityPolicy.MAX_UTILIZATION)
        runner = Runner(self.programs, self.params, self.spec.allocate(PAGES, self.mesh), self.mesh)
        return Engine(scheduler, runner, sink)


@pytest.fixture(scope="module")
def parts(tiny_llama: Path) -> Parts:
    return Parts(tiny_llama)


class Fault(Exception):
    """What a line raises."""


class Tracer:
    """Counts how often each line runs in the engine's thread, and has one line raise, once."""

    def __init__(self, target: Line | None = None, occurrence: int = 1) -> None:
        self.target, self.occurrence = target, occurrence
        self.hits: dict[Line, int] = {}
        self.raised = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        searched = path.startswith(FOLDER) and path.rpartition("/")[2] in SEARCHED
        return self._line if searched and threading.current_thread().name == "trtllm_jax-engine" else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        line = frame.f_code.co_filename.rpartition("/")[2], frame.f_lineno
        if event == "line" and not self.raised:
            self.hits[line] = self.hits.get(line, 0) + 1
            if line == self.target and self.hits[line] == self.occurrence:
                self.raised = True
                raise Fault(f"{line}")
        return self._line


def requests_of_every_kind() -> list[Request]:
    greedy = Sampling(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, seed=0, greedy=True)
    sampled = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, greedy=False)
    by_hand = LogitEdits(processors=(lambda *_: None,))
    first = Request(tuple(range(9)), 6, sampled)
    return [
        first,
        Request(first.prompt, 6, sampled, parent=first),
        Request((1, 2, 3), 20, greedy),
        Request(tuple(range(9)), 6, sampled, num_logprobs=2, stop_ids=frozenset({3})),
        Request((3, 3, 4), 6, greedy, edits=LogitEdits(repetition=1.3, no_repeat_ngram=2)),
        Request((5,), 5, greedy, edits=LogitEdits(bad=((1, 2),))),
        Request((6, 6), 5, greedy, edits=by_hand, num_logprobs=1),
        Request(tuple(range(12)), 3, greedy, keep_context=True, keep_logits=True),
        Request((8, 9), 1, greedy, keep_embedding=True),
    ]


def run_all(parts: Parts, tracer: Tracer) -> EngineDeadError | None:
    """Everything that an engine is asked, and whether each who waits is told; returns the engine's failure."""
    told: dict[Request, Update] = {}
    news = threading.Condition()

    def sink(updates: Sequence[Update]) -> None:
        with news:
            told.update({one.request: one for one in updates if one.finish is not None or one.error is not None})
            news.notify_all()

    threading.settrace(tracer)
    try:
        engine = parts.engine(sink)
    finally:
        threading.settrace(None)  # type: ignore[arg-type]
    requests = requests_of_every_kind()
    asked: list[Request] = []
    swapped = threading.Thread(target=update_weights, args=(engine, parts.params), daemon=True)
    with contextlib.suppress(EngineDeadError):  # who submits after the end is told at once
        engine.submit(requests)
        asked += requests
        engine.finish(requests[2], FinishReason.CANCELLED)
        swapped.start()
        more = requests_of_every_kind()[3:]
        engine.submit(more)
        asked += more
    with news:
        assert news.wait_for(lambda: told.keys() >= set(asked), SECONDS), "a sequence whose owner hears nothing"
    if swapped.ident is not None:
        swapped.join(SECONDS)
        assert not swapped.is_alive(), "new weights that are waited for"
    failure = engine.failure
    assert engine.close()
    for update in told.values():
        assert update.error is None or isinstance(update.error, EngineDeadError | Fault)
    return failure


def update_weights(engine: Engine, params: Any) -> None:
    with contextlib.suppress(EngineDeadError):
        engine.update_weights(params, copy=True)


@pytest.fixture(scope="module")
def lines(parts: Parts) -> list[tuple[Line, int]]:
    """Every line that runs, with how often it did."""
    tracer = Tracer()
    assert run_all(parts, tracer) is None
    assert {path for path, _ in tracer.hits} >= SEARCHED - {"compiler.py"}
    return sorted(tracer.hits.items())


def faults(lines: Sequence[tuple[Line, int]], every: int) -> Iterator[Tracer]:
    """A fault the first time that a line runs, and one in the middle of its runs."""
    for line, hits in lines[::every]:
        yield Tracer(line, 1)
        if hits > 3:
            yield Tracer(line, hits // 2)


def check_faults(parts: Parts, lines: Sequence[tuple[Line, int]], every: int) -> None:
    met = 0
    for tracer in faults(lines, every):
        failure = run_all(parts, tracer)
        met += tracer.raised
        assert failure is None or isinstance(failure.__cause__, Fault) or tracer.raised
    # Which lines a run meets depends on when threads come to run, a little.
    assert met > 0.8 * len(list(faults(lines, every)))


def test_a_fault_at_some_lines_reaches_everybody(parts: Parts, lines: list[tuple[Line, int]]) -> None:
    check_faults(parts, lines, every=12)


@pytest.mark.slow
def test_a_fault_at_any_line_reaches_everybody(parts: Parts, lines: list[tuple[Line, int]]) -> None:
    check_faults(parts, lines, every=1)
