"""Who runs next: admission, chunked prefill, decoding, preemption and the end of sequences.

The scheduler runs one step ahead of the device: it plans step n + 1 knowing that step n was dispatched, but not its
tokens. What it frees may still be written by a step in flight; that is safe, because steps run in order and every
position is written before it is read by its next owner.
"""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trtllm_jax.engine.cache_manager import CacheStats, Copy, KVCacheManager
from trtllm_jax.engine.limits import CapacityPolicy, SchedulerLimits
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import Admission, FinishReason, Request, Update
from trtllm_jax.engine.row_outputs import Due
from trtllm_jax.engine.step_output import StepOutput


@dataclass
class Counters:
    """Totals since the start, for the iteration statistics."""

    completed: int = 0
    preempted: int = 0


_ON_DEVICE = [-1]
"""The tokens of a row whose only one the device has drawn."""


class _Row(NamedTuple):
    """One row of a ragged step: a sequence's known tokens (-1 for one that only the device knows), from `first` on."""

    request: Request
    first: int
    tokens: list[int]
    emits: bool
    context: bool = False


class Scheduler:
    """Keeps every unfinished sequence and turns them into plans; used from one thread.

    Args:
        limits: of one step.
        cache: which pages each sequence holds.
        policy: when a sequence is admitted.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        cache: KVCacheManager,
        policy: CapacityPolicy = CapacityPolicy.GUARANTEED_NO_EVICT,
    ) -> None:
        self.limits = limits
        self.cache = cache
        self.policy = policy
        self.counters = Counters()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_slots = list(range(limits.max_batch_size - 1, -1, -1))
        self._penalised: list[Request] = []
        """Admitted since the last plan, and the device does not know their penalties yet."""

    @property
    def cache_stats(self) -> CacheStats:
        """Pages held and free."""
        return self.cache.stats

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self.waiting)

    def submit(self, request: Request) -> None:
        """Queue a sequence, first come first served. Its limit must fit the engine: the caller has checked."""
        self.waiting.append(request)

    def begin_weights(self) -> None:
        """From the next plan on other weights compute: what is cached serves only the sequences that hold it."""
        self.cache.begin_weights()

    # ---- planning ----

    def schedule(self) -> StepPlan | None:
        """The next dispatch, or None when nothing can run before a step in flight is committed."""
        self.cache.begin_plan()
        ready = [r for r in self.running if not r.prefilling and not r.exhausted]
        # What the host draws must be known before it can be computed.
        decoding = self._grow([r for r in ready if not (r.needs_host_token and r.in_flight)])
        chunks, copies = self._plan_prefill(self.limits.max_num_tokens - len(decoding))
        if chunks or any(request.needs_host_token for request in decoding):
            return self._ragged_plan(chunks, decoding, copies)
        return self._decode_plan(decoding) if decoding else None

    def _grow(self, decoding: Sequence[Request]) -> list[Request]:
        """Those sequences that have room for one more iteration; an older one may preempt newer ones for it."""
        grown = []
        each = self.limits.max_tokens_per_iteration
        for request in decoding:
            blocks = request.blocks
            if blocks is None:  # preempted for one of those before
                continue
            # Inline, because it runs for every row of every step.
            if blocks.tokens >= request.computed_max + each or self._make_room(request):
                grown.append(request)
        return grown

    @staticmethod
    def _reach(request: Request, tokens: int) -> int:
        """The most tokens of a sequence that are computed once it gains so many more; its last one never is."""
        return min(request.computed_max + tokens, request.limit - 1)

    def _make_room(self, request: Request) -> bool:
        """Give a sequence room for one iteration, preempting newer ones if need be; False if it is the newest."""
        end = self._reach(request, self.limits.max_tokens_per_iteration)
        while not self.cache.grow(request, request.computed_min, end):
            newest = self.running[-1]
            if newest is request:
                return False
            self._preempt(newest)
        return True

    def _iterations(self, decoding: Sequence[Request]) -> int:
        """How many iterations the next decode dispatch has; gives the rows room for them, but preempts no sequence."""
        if self.limits.max_decode_steps == 1:
            return 1
        left = max(request.limit - 1 - request.computed_min for request in decoding)
        steps, each = max(1, min(self.limits.max_decode_steps, left)), self.limits.max_tokens_per_iteration
        fixed = self.limits.fixed_decode_steps
        if fixed and (self.waiting or steps < self.limits.max_decode_steps):
            return 1
        while steps > 1:
            tokens = steps * each
            goals = {
                request: (request.computed_min, self._reach(request, tokens))
                for request in decoding
                # Only then may it lack pages. Inline, because it runs for every row.
                if request.blocks is not None and request.blocks.tokens < request.computed_max + tokens
            }
            if not goals or self.cache.grow_all(goals):
                return steps
            steps = 1 if fixed else steps // 2
        return 1

    def _plan_prefill(self, budget: int) -> tuple[dict[Request, int], list[list[Copy]]]:
        """Prompt tokens to compute of each running or newly admitted sequence, and the pages to copy for forks."""
        chunks: dict[Request, int] = {}
        copies: list[list[list[Copy]]] = []
        short = False
        for request in self.running:
            if request.prefilling and budget > 0:
                chunk = self._plan_chunk(request, budget, chunks)
                budget -= chunk
                short = short or not chunk
        skipped: list[Request] = []
        # Whoever waits for pages gets them before a sequence that comes after it.
        while self.waiting and budget > 0 and not short and len(self._free_slots) > self._extra_rows(chunks):
            request = self.waiting.popleft()
            if self._must_wait_for_others(request):
                skipped.append(request)
            elif (copied := self._admit(request)) is not None:
                copies.append(copied)
                budget -= self._plan_chunk(request, budget, chunks)
            else:
                skipped.append(request)
                break
        self.waiting.extendleft(reversed(skipped))
        return chunks, [list(itertools.chain(*of_group)) for of_group in zip(*copies, strict=True)]

    @staticmethod
    def _must_wait_for_others(request: Request) -> bool:
        """Whether a step not yet over decides what this sequence starts from; those behind it may go on."""
        parent = request.parent
        parent_computes = parent is not None and parent.finished is None and parent.dispatched < len(parent.prompt)
        return request.in_flight > 0 or parent_computes

    def _plan_chunk(self, request: Request, budget: int, chunks: dict[Request, int]) -> int:
        """Take as much of the prompt as the budget and the cache allow; returns the tokens taken."""
        first = request.computed_max
        chunk = min(request.prefill_end - first, budget)
        if request.reports_context:
            # Each of its tokens takes a row, because a row's last token alone has logits.
            chunk = min(chunk, 1 + len(self._free_slots) - self._extra_rows(chunks))
        if not self.cache.grow(request, first, first + chunk):
            return 0
        chunks[request] = chunk
        request.computed_min = request.computed_max = first + chunk
        self.cache.register(request, first + chunk)
        return chunk

    @staticmethod
    def _extra_rows(chunks: dict[Request, int]) -> int:
        """Rows of a plan beyond one for each sequence; free slots leave room for them."""
        return sum(chunk - 1 for request, chunk in chunks.items() if request.reports_context)

    def _admit(self, request: Request) -> list[list[Copy]] | None:
        """Give a waiting sequence a slot and pages, if there is room by the policy: the pages to copy for it."""
        prefix = self.cache.match(request)
        to_its_end = self.policy is CapacityPolicy.GUARANTEED_NO_EVICT
        # Where nothing is promised, a spare page a running sequence keeps the admission from being undone at once.
        if not self.cache.can_admit(request, prefix, to_its_end=to_its_end, spare=len(self.running)):
            return None
        request.slot = self._free_slots.pop()
        copies = self.cache.allocate(request, prefix)
        request.computed_min = request.computed_max = prefix.tokens
        request.prefill_end = request.total
        self.running.append(request)
        if request.penalised:
            self._penalised.append(request)
        if request.cached_tokens is None:
            request.cached_tokens = prefix.tokens
            request.waited = time.perf_counter() - request.submitted
        return copies

    def _preempt(self, request: Request) -> None:
        """Stop a sequence and queue it first; it will compute its tokens again, and loses none."""
        self.counters.preempted += 1
        self._leave(request)
        request.computed_min = request.computed_max = request.dispatched = 0
        self.waiting.appendleft(request)

    def _ragged_plan(
        self, chunks: dict[Request, int], decoding: Sequence[Request], copies: Sequence[Sequence[Copy]]
    ) -> StepPlan:
        rows = [self._decoding_row(request) for request in decoding]
        for request, chunk in chunks.items():
            rows += self._prompt_rows(request, chunk)
        requests = tuple(row.request for row in rows)
        self._dispatched(requests)
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(row.tokens) for row in rows], out=starts[1:])
        tokens = itertools.chain.from_iterable(row.tokens for row in rows)
        slots = _slots(requests)
        return StepPlan(
            kind="ragged",
            requests=requests,
            slots=slots,
            page_tables=self.cache.page_tables(slots),
            tokens=np.fromiter(tokens, np.int32, int(starts[-1])),
            starts=starts,
            first=np.array([row.first for row in rows], np.int32),
            emits=np.array([row.emits for row in rows], np.bool_),
            context=np.array([row.context for row in rows], np.bool_),
            copies=tuple(map(tuple, copies)),
            penalised=self._newly_penalised(),
        )

    @staticmethod
    def _decoding_row(request: Request) -> _Row:
        position = request.computed_min
        request.computed_min += 1
        request.computed_max += 1
        if request.needs_host_token:
            return _Row(request, position, request.tokens(position, position + 1), True)
        return _Row(request, -1, _ON_DEVICE, True)

    @staticmethod
    def _prompt_rows(request: Request, chunk: int) -> list[_Row]:
        """A row for a chunk of a prompt, or one for each of its tokens where their logits are reported."""
        first, emits = request.computed_max - chunk, not request.prefilling
        known = request.tokens(first, request.computed_max)
        if not request.reports_context:
            return [_Row(request, first, known, emits)]
        return [
            _Row(
                request,
                position,
                [token],
                emits=emits and position + 1 == request.computed_max,
                context=position >= request.context_sent,
            )
            for position, token in enumerate(known, start=first)
        ]

    def _decode_plan(self, decoding: Sequence[Request]) -> StepPlan:
        steps, each = self._iterations(decoding), self.limits.max_tokens_per_iteration
        gains = [] if each == 1 else [self._progress(request, steps, steps * each) for request in decoding]
        for request in decoding:
            if each == 1:
                # Both bounds are one: without a choice of how many tokens an iteration gains, it gains one.
                request.computed_min = request.computed_max = min(request.computed_max + steps, request.limit - 1)
            request.in_flight += 1
            request.dispatched = request.computed_min
        slots = _slots(decoding)
        return StepPlan(
            kind="decode",
            requests=tuple(decoding),
            slots=slots,
            newest_pages=self.cache.newest_pages(decoding, slots),
            steps=steps,
            gains=tuple(gains),
            penalised=self._newly_penalised(),
        )

    @staticmethod
    def _progress(request: Request, least: int, most: int) -> tuple[int, int]:
        """Move a sequence's bounds by what a dispatch gains it, beyond its limit if need be: both are settled later."""
        request.computed_min += least
        request.computed_max += most
        return least, most

    @staticmethod
    def _dispatched(rows: Sequence[Request]) -> None:
        for request in rows:
            request.in_flight += 1
            request.dispatched = request.computed_min

    def _newly_penalised(self) -> tuple[Request, ...]:
        # One that ended or was preempted before its first step has no slot any more.
        penalised = tuple(request for request in self._penalised if request.slot is not None)
        self._penalised.clear()
        return penalised

    # ---- what came of it ----

    def commit(self, plan: StepPlan, output: StepOutput) -> list[Update]:
        """Take what each row of a plan gained; returns the updates for their owners.

        Rows whose sequence ended while the step was in flight are ignored. Logits and embeddings are copied, because
        the whole step's would live as long as one row's.
        """
        updates: list[Update] = []
        for row, request in enumerate(plan.requests):
            request.in_flight -= 1
            if request.finished is None and (update := self._commit_row(plan, output, row, request)) is not None:
                updates.append(update)
                if update.finish is not None:
                    self._remove(request)
        return updates

    def _commit_row(self, plan: StepPlan, output: StepOutput, row: int, request: Request) -> Update | None:
        """The update of one row's sequence, which may end it; None where there is nothing to report."""
        if row in output.failures:
            request.finished = FinishReason.CANCELLED
            return Update(request, finish=request.finished, error=output.failures[row])
        gained = output.tokens[row]
        reports_context = plan.kind == "ragged" and bool(plan.context[row])
        if reports_context:
            request.context_sent += 1
        if plan.gains:
            least, most = plan.gains[row]
            request.computed_min += len(gained) - least
            request.computed_max += len(gained) - most
        if not gained and not reports_context:
            return None
        admission = None
        if gained:
            if not request.generated:
                admission = Admission(request.cached_tokens or 0, request.waited)
            gained = self._take_tokens(request, gained)
            # The last token's key and value are not written yet.
            self.cache.register(request, request.total - 1)
        if not request.row_outputs:
            return Update(request, gained, request.finished, None, admission)
        return Update(request, gained, request.finished, None, admission, _outputs(plan, output, row, len(gained)))

    @staticmethod
    def _take_tokens(request: Request, gained: list[int]) -> list[int]:
        """Add what a sequence gained, up to a stop token or its limit, which end it."""
        if request.stop_ids and not request.stop_ids.isdisjoint(gained):
            end = next(i for i, token in enumerate(gained) if token in request.stop_ids)
            gained = gained[: end + 1]
            request.finished = FinishReason.STOP
        request.generated += gained
        if request.finished is None and len(request.generated) >= request.max_tokens:
            request.finished = FinishReason.LENGTH
        return gained

    def finish(self, request: Request, reason: FinishReason) -> Update | None:
        """End a sequence from outside (an abort, a stop string); None if it had ended already."""
        if request.finished is not None:
            return None
        request.finished = reason
        self._remove(request)
        return Update(request, finish=reason)

    def _remove(self, request: Request) -> None:
        self.counters.completed += 1
        if request.slot is not None:
            self._leave(request)
        else:
            self.waiting.remove(request)

    def _leave(self, request: Request) -> None:
        """Take a running sequence's slot and pages back."""
        assert request.slot is not None
        self.cache.free(request)
        self._free_slots.append(request.slot)
        self.running.remove(request)
        request.slot = None


def _outputs(plan: StepPlan, output: StepOutput, row: int, gained: int) -> dict[str, list[Any]]:
    """What a row's sequence requested besides the tokens that it gained."""
    found: dict[str, list[Any]] = {}
    for wanted in plan.requests[row].row_outputs:
        by_row = output.by_row[wanted.source]
        # What is due after every token must be there; the others a program made for this row, or not.
        if plan.is_due(row, wanted.due) and (row in by_row or (gained and wanted.due is Due.TOKEN)):
            value = by_row[row]
            found[wanted.name] = [value.copy()] if isinstance(value, np.ndarray) else value[:gained]
    return found


def _slots(requests: Sequence[Request]) -> np.ndarray:
    return np.fromiter((request.slot for request in requests), np.int32, len(requests))
