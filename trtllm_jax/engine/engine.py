"""The engine's loop: one thread that accepts sequences, plans steps, runs them and reports their results."""

import atexit
import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple

from trtllm_jax.common.errors import EngineDeadError, RequestError
from trtllm_jax.engine.encode_scheduler import EncodeScheduler
from trtllm_jax.engine.events import CacheEvents, Record, iteration_stats
from trtllm_jax.engine.flight import EditedDraw, InFlight
from trtllm_jax.engine.host_sampling import draw_on_host
from trtllm_jax.engine.packer import Packer
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import FinishReason, Logits, Request, Update
from trtllm_jax.engine.runner import Runner
from trtllm_jax.engine.scheduler import Scheduler
from trtllm_jax.engine.step_edits import advance_matchers, step_edits
from trtllm_jax.logger import logger

_running: set["Engine"] = set()
"""Engines whose thread runs: a program's end waits for them, because a step in flight calls back into Python."""


class _Command(NamedTuple):
    """What another thread asks of the engine's, and who waits for it."""

    run: Callable[[], Any]
    done: Future[None] | None = None


class Engine:
    """Runs submitted sequences to their end; every method may be called from any thread.

    Each sequence that was submitted gets one last update, whatever fails: its end, or the failure.

    Args:
        scheduler: decides what runs; used by the engine's thread alone from now on, and so is the runner.
        packer: writes the dispatches of a step.
        runner: has them computed.
        sink: called from the engine's thread with the updates of each step; must not block.
        ended: called from the engine's thread after the last update.
        overlap_scheduling: whether a step is dispatched before the one before it was read.
        batched_processor: called once a step for the sequences that ask for it.
        cache_events: the prefix cache's, where they are kept.
        stats_length: iteration statistics kept for `drain_stats`.
    """

    def __init__(
        self,
        scheduler: Scheduler | EncodeScheduler,
        packer: Packer,
        runner: Runner,
        sink: Callable[[Sequence[Update]], None],
        ended: Callable[[], None] = lambda: None,
        *,
        overlap_scheduling: bool = True,
        batched_processor: Callable[..., object] | None = None,
        cache_events: CacheEvents | None = None,
        stats_length: int = 0,
    ) -> None:
        self.limits = scheduler.limits
        self.cache_events = cache_events
        self._scheduler = scheduler
        self._packer = packer
        self._runner = runner
        self._sink = sink
        self._ended = ended
        self._overlap_scheduling = overlap_scheduling
        self._batched_processor = batched_processor
        self._stats: deque[Record] = deque(maxlen=stats_length)
        self._iteration = 0
        self._last_commit = 0.0
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished: dict[Request, None] = {}
        """Every sequence whose end has not been reported to its owner, whether it waits or runs."""
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="trtllm_jax-engine", daemon=True)
        _running.add(self)
        self._thread.start()

    @property
    def kv_pages(self) -> int:
        """Pages that sequences can hold."""
        return self._scheduler.cache_stats.capacity

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._scheduler.cache_stats.page_size

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue sequences; their updates go to the sink.

        Raises:
            RequestError: a sequence cannot fit the engine; none of them is queued.
            EngineDeadError: the engine's thread failed.
            RuntimeError: the engine is shut down, or this is its own thread.
        """
        self.refuse_own_thread()
        for request in requests:
            if not request.prompt:
                raise RequestError("the prompt holds no tokens; give at least one")
            if request.limit > self.limits.max_seq_len:
                raise RequestError(
                    f"prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} exceed "
                    f"max_seq_len={self.limits.max_seq_len}; shorten one or raise max_seq_len"
                )

        def queue_all() -> None:
            for request in requests:
                self._scheduler.submit(request)

        with self._lock:
            if refusal := self._refusal():
                raise refusal
            self._unfinished.update(dict.fromkeys(requests))
            self._commands.put(_Command(queue_all))

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a sequence soon; no effect if it has ended. Its last update carries the reason."""

        def end() -> None:
            update = self._scheduler.finish(request, reason)
            if update:
                self._report([update])

        # A dead or closed engine has ended every sequence and said so.
        self._commands.put(_Command(end))

    @property
    def params(self) -> Any:
        """The weights that the next step will read: the engine's own arrays.

        Raises EngineDeadError or RuntimeError as `submit` does.
        """
        if refusal := self._refusal():
            raise refusal
        return self._runner.params

    def update_weights(self, params: Any, *, copy: bool) -> None:
        """Have every step from the next one on read `params`, or copies; returns when no later step reads others.

        Raises:
            ValueError: they do not fit; nothing has changed.
            EngineDeadError: the engine's thread failed.
            RuntimeError: the engine is shut down, or this is its own thread.
        """
        self.refuse_own_thread()
        fitted = self._runner.fitted(params, copy=copy)
        swapped: Future[None] = Future()

        def swap() -> None:
            self._runner.params = fitted
            self._scheduler.begin_weights()

        with self._lock:
            if refusal := self._refusal():
                raise refusal
            self._commands.put(_Command(swap, swapped))
        swapped.result()

    def compile_rest(self) -> None:
        """Return when every program is compiled. Raises EngineDeadError or RuntimeError as `submit` does."""
        with contextlib.suppress(CancelledError):  # by the engine's end
            self._runner.compile_rest()
        if refusal := self._refusal():
            raise refusal

    def drain_stats(self) -> list[Record]:
        """The statistics of the steps since the last call, oldest first."""
        stats = []
        while self._stats:
            stats.append(self._stats.popleft())
        return stats

    def close(self) -> bool:
        """End every sequence as cancelled, wait for the steps in flight, stop the thread; may be called again.

        From the engine's own thread, where a user's function calls it, the same happens after this step: False.
        """
        self.abandon()
        if self._thread is threading.current_thread():
            return False
        self._thread.join()
        return True

    def abandon(self) -> None:
        """`close` without waiting, and without a lock: the garbage collector may call it from anywhere."""
        # Python's end may call it after a close, when this module's names are gone.
        if not self._closed:
            self._commands.put(_Command(self._mark_closed))

    def refuse_own_thread(self) -> None:
        """RuntimeError in the engine's thread, which would wait for itself."""
        if self._thread is threading.current_thread():
            raise RuntimeError(
                "this runs in the engine's own thread, as logits processors do, and would wait for itself: call it "
                "from another thread, and do not wait for that"
            )

    def _mark_closed(self) -> None:
        with self._lock:
            self._closed = True

    def _refusal(self) -> RuntimeError | None:
        """Why nothing more can be asked of this engine, if that is so."""
        return self.failure or (RuntimeError("LLM is shutting down") if self._closed else None)

    @property
    def failure(self) -> EngineDeadError | None:
        """What ended the engine's thread, None while it lives or where it was closed."""
        if self._failure is None:
            return None
        error = EngineDeadError(f"the engine stopped: {self._failure!r}")
        error.__cause__ = self._failure
        return error

    # ---- the engine's thread ----

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as failure:
            self._fail(failure)
        for end in (self._end_everything, self._runner.close):
            try:
                end()
            except BaseException:
                logger.exception("the engine could not be closed in order")
        _running.discard(self)
        self._ended()

    def _fail(self, failure: BaseException) -> None:
        with_cause = failure
        with contextlib.suppress(Exception):
            with_cause = self._runner.with_cause(failure)
        with self._lock:
            self._failure = with_cause

    def _loop(self) -> None:
        """One step ahead: while the device runs step n, the host plans n + 1, then reads the tokens of n."""
        flight: InFlight | None = None
        while True:
            self._run_commands(wait=flight is None and not self._scheduler.has_work)
            if self._closed:
                return
            plan = self._scheduler.schedule()
            if plan is None and flight is None and self._scheduler.has_work:
                raise RuntimeError("no sequence can run, and none is running: a fault of the scheduler")
            following = self._dispatch(plan) if plan else None
            if flight:
                self._commit(flight)
            flight = following
            if flight and not self._overlap_scheduling:
                self._commit(flight)
                flight = None
            # What ended is its owner's alone, also while this thread waits.
            plan = following = None

    def _run_commands(self, wait: bool) -> None:
        """Run the commands of other threads; `wait` for one if there is nothing else to do."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            try:
                command.run()
            except BaseException:
                self._commands.put(command)  # so that its waiter gets the failure with the others
                raise
            if command.done:
                command.done.set_result(None)
            del command

    def _dispatch(self, plan: StepPlan) -> InFlight:
        dispatched = time.perf_counter()
        results = self._runner.run(self._packer.step(plan))
        draws: tuple[EditedDraw, ...] = ()
        if plan.edited:
            # While the device computes the step: only the draw needs them.
            draws = tuple(
                EditedDraw(edits, self._runner.run(self._packer.edited(plan, edits)))
                for edits in step_edits(plan, self._packer.vocab, self._packer.edits_at_once)
            )
        return InFlight(plan, results, self._packer.extras(plan), draws, dispatched)

    def _commit(self, flight: InFlight) -> None:
        plan, output = flight.plan, flight.output(self._runner.read)
        if plan.drawn_on_host:
            draw_on_host(plan, output, self._draw, self._batched_processor)
        advance_matchers(plan, output)
        self._report(self._scheduler.commit(plan, output))
        self._iteration += 1
        ended = time.perf_counter()
        if self._stats.maxlen:
            # A step dispatched ahead begins when the one before it has ended: their sum is the time that they took.
            seconds = ended - max(flight.dispatched, self._last_commit)
            self._stats.append(iteration_stats(self._iteration, seconds, plan, self._scheduler))
        self._last_commit = ended

    def _draw(self, logits: Logits, requests: Sequence[Request]) -> list[int]:
        """A token for each row of logits that users' functions have changed; waits for the device."""
        drawn = self._runner.read(self._runner.run(self._packer.draw(logits, requests)))["sampled"]
        return drawn[: len(requests)].tolist()

    def _report(self, updates: Sequence[Update]) -> None:
        if not updates:
            return
        self._sink(updates)
        for update in updates:
            if update.finish is not None or update.error is not None:
                self._unfinished.pop(update.request, None)

    def _end_everything(self) -> None:
        """Report to every owner that its sequence has ended, and fail the commands that were not run."""
        self._mark_closed()
        error = self.failure
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if command.done:
                    command.done.set_exception(error or RuntimeError("LLM is shutting down"))
        unfinished = list(self._unfinished)
        for request in unfinished:
            request.finished = FinishReason.CANCELLED
        self._report([Update(request, finish=FinishReason.CANCELLED, error=error) for request in unfinished])


@atexit.register
def _close_all() -> None:
    """Registered after jax's own, so that it runs before: the devices are still there."""
    for engine in list(_running):
        engine.close()


# A forked child has no engine thread to wait for, and its copies of locks are never released.
os.register_at_fork(after_in_child=_running.clear)
