"""Who runs next where sequences are computed whole, in one step each and without a cache."""

import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import numpy as np

from trtllm_jax.engine.cache_manager import CacheStats
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import Admission, FinishReason, Request, Update
from trtllm_jax.engine.scheduler import Counters
from trtllm_jax.engine.step_output import StepOutput


class EncodeScheduler:
    """Turns waiting sequences into steps of about equal lengths; used from one thread.

    Args:
        limits: of one step.
        widths: lengths that steps are compiled for, ascending; the last one is that of the longest sequence.
    """

    def __init__(self, limits: SchedulerLimits, widths: Sequence[int]) -> None:
        self.limits = limits
        self.counters = Counters()
        self.cache_stats = CacheStats(capacity=0, available=0, used=0, page_size=0, allocated=0, reused=0, missed=0)
        self.waiting: OrderedDict[Request, None] = OrderedDict()
        """In the order in which they came; a plain dict would search for its first one past all that have left."""
        self.running: list[Request] = []
        self._widths = tuple(widths)
        self._of_width: dict[int, OrderedDict[Request, None]] = {width: OrderedDict() for width in self._widths}
        """Those that wait, by the length that they are padded to."""

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits."""
        return bool(self.waiting)

    def submit(self, request: Request) -> None:
        """Queue a sequence, first come first served. It must fit the engine: the caller has checked."""
        self.waiting[request] = None
        self._of_width[self._width(request)][request] = None

    def begin_weights(self) -> None:
        """From the next plan on other weights compute; no sequence keeps anything from step to step."""

    def schedule(self) -> StepPlan | None:
        """The next step: the sequence that has waited longest, and others that are padded to the same length."""
        if not self.waiting:
            return None
        width = self._width(next(iter(self.waiting)))
        room = self.limits.rows_of_width(width)
        taken = list(islice(self._of_width[width], room))
        self.running += taken
        for request in taken:
            self._leaves(request)
            request.in_flight = 1
            request.prefill_end = len(request.prompt)
            request.cached_tokens, request.waited = 0, time.perf_counter() - request.submitted
        starts = np.zeros(len(taken) + 1, np.int32)
        np.cumsum([len(request.prompt) for request in taken], out=starts[1:])
        return StepPlan(
            kind="encode",
            requests=tuple(taken),
            slots=np.zeros(0, np.int32),
            tokens=np.concatenate([np.asarray(request.prompt, np.int32) for request in taken]),
            starts=starts,
            first=np.zeros(len(taken), np.int32),
            emits=np.ones(len(taken), np.bool_),
        )

    def commit(self, plan: StepPlan, output: StepOutput) -> list[Update]:
        """End the sequences of a step, each with its vector; those that ended meanwhile are ignored."""
        updates = []
        for row, request in enumerate(plan.requests):
            request.in_flight = 0
            self.running.remove(request)
            if request.finished is not None:
                continue
            request.finished = FinishReason.STOP
            self.counters.completed += 1
            # A copy, because the whole step's would live as long as one row's.
            vector = output.by_row["embeddings"][row].copy()
            admission = Admission(0, request.waited)
            updates.append(Update(request, [], request.finished, None, admission, {"embedding": [vector]}))
        return updates

    def finish(self, request: Request, reason: FinishReason) -> Update | None:
        """End a sequence from outside; None if it had ended already."""
        if request.finished is not None:
            return None
        request.finished = reason
        self.counters.completed += 1
        if not request.in_flight:
            self._leaves(request)
        return Update(request, finish=reason)

    def _leaves(self, request: Request) -> None:
        del self.waiting[request]
        del self._of_width[self._width(request)][request]

    def _width(self, request: Request) -> int:
        return self._widths[bisect_left(self._widths, len(request.prompt))]
