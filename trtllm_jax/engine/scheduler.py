"""Who runs next: admission, chunked prefill, decoding, preemption and the end of sequences.

The scheduler runs one step ahead of the device: it plans step n + 1 knowing that step n was dispatched, but not its
tokens. What it frees may still be written by a step in flight; that is safe, because steps run in order and every
position is written before it is read by its next owner.
"""

import enum
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trtllm_jax.engine.block_pool import BlockPool, block_hash
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import Admission, Embedding, FinishReason, Logits, Request, TokenLogprobs, Update

_NOTHING = np.zeros(0, np.int32)
_NO_PAGES = np.zeros((0, 0), np.int32)
_NOTHING_BY_ROW: Mapping[int, Any] = {}


def pages_per_dispatch(max_decode_steps: int, page_size: int) -> int:
    """The most pages that a row gains for one decode dispatch."""
    return -(-max_decode_steps // page_size)


class CapacityPolicy(enum.StrEnum):
    """When a waiting sequence is admitted (TensorRT-LLM's CapacitySchedulerPolicy)."""

    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    """Once the pages for its prompt and all its new tokens are reserved: it is never stopped."""
    MAX_UTILIZATION = "MAX_UTILIZATION"
    """Once there are pages for its prompt; the newest sequence is stopped and recomputed when pages run out."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that bound one step.

    Attributes:
        max_batch_size: sequences that run at once.
        max_num_tokens: tokens of one ragged step; at least max_batch_size, so that every row can decode.
        max_seq_len: tokens of a sequence.
        max_decode_steps: tokens a row may gain in one dispatch.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_decode_steps: int


@dataclass
class Counters:
    """Totals since the start, for the iteration statistics."""

    completed: int = 0
    preempted: int = 0
    reused_pages: int = 0
    missed_pages: int = 0
    allocated_pages: int = 0


class Scheduler:
    """Keeps every unfinished sequence and turns them into plans; used from one thread.

    Args:
        limits: of one step.
        pool: the pages.
        policy: when a sequence is admitted.
        rope_stretch: the longest sequence whose keys depend on nothing but the tokens before them; those of a longer
            prompt depend on its length as well. None where there is no such bound.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        pool: BlockPool,
        policy: CapacityPolicy = CapacityPolicy.GUARANTEED_NO_EVICT,
        rope_stretch: int | None = None,
    ) -> None:
        self.limits = limits
        self.pool = pool
        self.policy = policy
        self._rope_stretch = rope_stretch
        self.counters = Counters()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._weights = 0
        self._free_slots = list(range(limits.max_batch_size - 1, -1, -1))
        self._penalised: list[Request] = []
        """Admitted since the last plan, and the device does not know their penalties yet."""
        self._owed = 0
        """Pages that running sequences may still ask for."""
        width = -(-limits.max_seq_len // pool.page_size)
        self._page_table = np.zeros((limits.max_batch_size, width), np.int32)
        self._pages_per_dispatch = pages_per_dispatch(limits.max_decode_steps, pool.page_size)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self.waiting)

    def submit(self, request: Request) -> None:
        """Queue a sequence, first come first served. Its limit must fit the engine: the caller has checked."""
        self.waiting.append(request)

    def begin_weights(self) -> None:
        """From the next plan on other weights compute: what is cached serves only the sequences that hold it."""
        self._weights += 1
        self.pool.forget_all()

    # ---- planning ----

    def schedule(self) -> StepPlan | None:
        """The next dispatch, or None when nothing can run before a step in flight is committed."""
        ready = [r for r in self.running if not r.prefilling and not r.exhausted]
        # What the host draws must be known before it can be computed.
        decoding = self._grow([r for r in ready if not (r.needs_host_token and r.in_flight)])
        chunks, copies = self._plan_prefill(self.limits.max_num_tokens - len(decoding))
        if chunks or any(request.needs_host_token for request in decoding):
            return self._ragged_plan(chunks, decoding, copies)
        return self._decode_plan(decoding, self._extend(decoding)) if decoding else None

    def _grow(self, decoding: Sequence[Request]) -> list[Request]:
        """Those sequences that hold a page for their next token; an older one may stop newer ones for it."""
        grown = []
        page_size = self.pool.page_size
        for request in decoding:
            if request.slot is None:
                continue
            if len(request.pages) * page_size > request.computed or self._make_room(request):
                request.computed += 1
                grown.append(request)
        return grown

    def _make_room(self, request: Request) -> bool:
        """Give a sequence one more page, stopping newer sequences if need be; False if it is the newest itself."""
        while not self.pool.available:
            newest = self.running[-1]
            if newest is request:
                return False
            self._preempt(newest)
        self._hold_pages(request, 1)
        return True

    def _extend(self, decoding: Sequence[Request]) -> int:
        """How many tokens each sequence may gain in one dispatch; gives it the pages, but stops nobody for them."""
        page_size, limit = self.pool.page_size, self.limits.max_decode_steps
        steps = max(1, min(limit, max(request.limit - request.computed for request in decoding)))
        while steps > 1:
            goals = [min(request.computed + steps - 1, request.limit - 1) for request in decoding]
            missing = [
                -(-goal // page_size) - len(request.pages) for goal, request in zip(goals, decoding, strict=True)
            ]
            if sum(pages for pages in missing if pages > 0) <= self.pool.available:
                for request, goal, pages in zip(decoding, goals, missing, strict=True):
                    request.computed = goal
                    if pages > 0:
                        self._hold_pages(request, pages)
                return steps
            steps //= 2
        return 1

    def _plan_prefill(self, budget: int) -> tuple[dict[Request, int], list[tuple[int, int]]]:
        """Prompt tokens to compute of each running or newly admitted sequence, and pages to copy for forks."""
        chunks: dict[Request, int] = {}
        copies: list[tuple[int, int]] = []
        for request in self.running:
            if request.prefilling and budget > 0:
                budget -= self._plan_chunk(request, budget, chunks)
        skipped: list[Request] = []
        while self.waiting and budget > 0 and len(self._free_slots) > self._extra_rows(chunks):
            request = self.waiting.popleft()
            if self._must_wait_for_others(request):
                skipped.append(request)
            elif self._admit(request, copies):
                budget -= self._plan_chunk(request, budget, chunks)
            else:
                skipped.append(request)
                break
        self.waiting.extendleft(reversed(skipped))
        return chunks, copies

    @staticmethod
    def _must_wait_for_others(request: Request) -> bool:
        """Whether a step not yet over decides what this sequence starts from; those behind it may go on."""
        parent = request.parent
        parent_computes = parent is not None and parent.finished is None and parent.dispatched < len(parent.prompt)
        return request.in_flight > 0 or parent_computes

    def _plan_chunk(self, request: Request, budget: int, chunks: dict[Request, int]) -> int:
        """Take as much of the prompt as the budget allows; returns the tokens taken."""
        chunk = min(request.prefill_end - request.computed, budget)
        if request.reports_context:
            # Each of its tokens takes a row, because a row's last token alone has logits.
            chunk = min(chunk, 1 + len(self._free_slots) - self._extra_rows(chunks))
        chunks[request] = chunk
        request.computed += chunk
        self._register(request, request.computed)
        return chunk

    @staticmethod
    def _extra_rows(chunks: dict[Request, int]) -> int:
        """Rows of a plan beyond one a sequence; slots that nobody holds leave room for them."""
        return sum(chunk - 1 for request, chunk in chunks.items() if request.reports_context)

    def _admit(self, request: Request, copies: list[tuple[int, int]]) -> bool:
        """Give a waiting sequence a slot and pages for its known tokens, if there is room by the policy."""
        known, copied = self._known_prefix(request)
        page_size = self.pool.page_size
        needed = -(-request.total // page_size) - len(known)
        promised = -(-request.limit // page_size) - len(known) - needed
        no_evict = self.policy is CapacityPolicy.GUARANTEED_NO_EVICT
        # Where nothing is promised, a spare page a running sequence keeps the admission from being undone at once.
        spare = self._owed + promised if no_evict else len(self.running)
        if self.pool.available - self.pool.idle(known) < needed + spare:
            return False
        self.pool.share(known)
        request.weights = self._weights
        request.pages = list(known)
        request.slot = self._free_slots.pop()
        self._page_table[request.slot] = 0
        self._page_table[request.slot, : len(known)] = known
        self._owed += needed + promised
        self._hold_pages(request, needed)
        request.registered = len(known)
        request.computed = len(known) * page_size
        request.prefill_end = request.total
        self.running.append(request)
        if request.penalised:
            self._penalised.append(request)
        if copied is not None:
            copies.append((copied, request.pages[len(known)]))
            request.computed = request.total - 1
        if request.cached_tokens is None:
            request.cached_tokens = request.computed
            request.waited = time.perf_counter() - request.submitted
            self.counters.reused_pages += len(known)
            self.counters.missed_pages += needed
        return True

    def _hold_pages(self, request: Request, count: int) -> None:
        """Give a running sequence `count` more pages, which the caller knows to be available."""
        first = len(request.pages)
        request.pages += self.pool.allocate(count)
        self._page_table[request.slot, first : first + count] = request.pages[first:]
        self.counters.allocated_pages += count
        self._owed -= count

    def _known_prefix(self, request: Request) -> tuple[list[int], int | None]:
        """Pages that hold the sequence's beginning already, and for a fork the parent's partial page to copy.

        At least one token is left to compute, because its logits give the next one.
        """
        full, rest = divmod(request.total - 1, self.pool.page_size)
        parent = request.parent
        if parent is not None and parent.slot is not None and not request.generated and self._is_current(parent):
            return parent.pages[:full], parent.pages[full] if rest else None
        if not self.pool.reuse or request.reports_context:
            return [], None
        self._extend_hashes(request, full)
        return self.pool.match(request.hashes[:full]), None

    def _extend_hashes(self, request: Request, blocks: int) -> None:
        page_size = self.pool.page_size
        for index in range(len(request.hashes), blocks):
            parent = request.hashes[-1] if index else self._chain_start(request)
            request.hashes.append(block_hash(parent, request.tokens(index * page_size, (index + 1) * page_size)))

    def _chain_start(self, request: Request) -> bytes:
        """What its pages depend on besides its tokens."""
        length = len(request.prompt)
        if self._rope_stretch is None or length <= self._rope_stretch:
            return request.salt
        # As long as a salt, and so never a block's own hash.
        return hashlib.sha512(request.salt + length.to_bytes(8, "big")).digest()

    def _register(self, request: Request, tokens: int) -> None:
        """Make the full pages among the first `tokens` known and computed tokens findable."""
        page_size = self.pool.page_size
        blocks = tokens // page_size
        if not self.pool.reuse or blocks <= request.registered or not self._is_current(request):
            return
        self._extend_hashes(request, blocks)
        for index in range(request.registered, blocks):
            parent = request.hashes[index - 1] if index else b""
            known = request.tokens(index * page_size, (index + 1) * page_size)
            self.pool.register(request.pages[index], parent, request.hashes[index], known)
        request.registered = blocks

    def _is_current(self, request: Request) -> bool:
        """Whether all that a running sequence holds is computed with the weights of the next plan."""
        return request.weights == self._weights

    def _preempt(self, request: Request) -> None:
        """Stop a sequence and queue it first; it will compute its tokens again, and loses none."""
        self.counters.preempted += 1
        self._leave(request)
        request.computed = request.dispatched = request.registered = 0
        self.waiting.appendleft(request)

    def _ragged_plan(
        self, chunks: dict[Request, int], decoding: Sequence[Request], copies: Sequence[tuple[int, int]]
    ) -> StepPlan:
        rows: list[Request] = []
        parts: list[tuple[int, list[int], bool, bool]] = []
        for request in decoding:
            rows.append(request)
            known = request.tokens(request.computed - 1, request.computed) if request.needs_host_token else [-1]
            parts.append((request.computed - 1 if request.needs_host_token else -1, known, True, False))
        for request, chunk in chunks.items():
            first, emits = request.computed - chunk, not request.prefilling
            known = request.tokens(first, request.computed)
            if not request.reports_context:
                rows.append(request)
                parts.append((first, known, emits, False))
                continue
            for position, token in enumerate(known, start=first):
                rows.append(request)
                last = position + 1 == request.computed
                reported = position >= request.context_sent
                parts.append((position, [token], emits and last, reported))
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(known) for _, known, _, _ in parts], out=starts[1:])
        return self._plan(
            "step",
            rows,
            np.fromiter(itertools.chain.from_iterable(known for _, known, _, _ in parts), np.int32, int(starts[-1])),
            starts,
            np.array([first for first, *_ in parts], np.int32),
            np.array([emits for _, _, emits, _ in parts], np.bool_),
            np.array([reported for *_, reported in parts], np.bool_),
            1,
            tuple(copies),
        )

    def _decode_plan(self, decoding: Sequence[Request], steps: int) -> StepPlan:
        return self._plan("decode", decoding, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, steps, ())

    def _plan(
        self,
        kind: Literal["step", "decode"],
        rows: Sequence[Request],
        tokens: np.ndarray,
        starts: np.ndarray,
        first: np.ndarray,
        emits: np.ndarray,
        context: np.ndarray,
        steps: int,
        copies: tuple[tuple[int, int], ...],
    ) -> StepPlan:
        for request in rows:
            request.in_flight += 1
            request.dispatched = request.computed
        slots = np.fromiter((request.slot for request in rows), np.int32, len(rows))
        if kind == "step":
            page_table, newest = self._page_table[slots], _NO_PAGES
        else:
            held = np.fromiter((len(request.pages) for request in rows), np.int32, len(rows))
            columns = np.maximum(held[:, None] - np.arange(self._pages_per_dispatch, 0, -1), 0)
            page_table, newest = _NO_PAGES, np.stack([columns, self._page_table[slots[:, None], columns]], axis=2)
        # One that ended or was stopped before its first step has no slot any more.
        penalised = tuple(request for request in self._penalised if request.slot is not None)
        self._penalised.clear()
        return StepPlan(
            kind,
            tuple(rows),
            slots,
            page_table,
            newest,
            tokens,
            starts,
            first,
            emits,
            context,
            steps,
            copies,
            penalised,
        )

    # ---- what came of it ----

    def commit(
        self,
        plan: StepPlan,
        tokens: Sequence[Sequence[int]],
        logprobs: Mapping[int, Sequence[TokenLogprobs]] = _NOTHING_BY_ROW,
        logits: Mapping[int, Logits] = _NOTHING_BY_ROW,
        failures: Mapping[int, Exception] = _NOTHING_BY_ROW,
        embeddings: Mapping[int, Embedding] = _NOTHING_BY_ROW,
    ) -> list[Update]:
        """Take the tokens that each row of a plan gained; returns what to tell the owners.

        What only some rows have is given by row: log-probabilities of those that report them, `logits` [vocab] and
        `embeddings` of those that the plan names, which are copied, because the whole step's would live as long as
        one row's, and the failures that end their sequences. Rows whose sequence ended while the step was in flight
        are ignored.
        """
        updates: list[Update] = []
        for index, request in enumerate(plan.requests):
            request.in_flight -= 1
            if request.finished is not None:
                continue
            if index in failures:
                request.finished = FinishReason.CANCELLED
                updates.append(Update(request, finish=request.finished, error=failures[index]))
                self._remove(request)
                continue
            context: tuple[Logits, ...] = ()
            if plan.kind == "step" and plan.context[index]:
                request.context_sent += 1
                context = (logits[index].copy(),)
            gained = tokens[index]
            if not gained:
                if context:
                    updates.append(Update(request, context=context))
                continue
            if request.stop_ids and not request.stop_ids.isdisjoint(gained):
                end = next(i for i, token in enumerate(gained) if token in request.stop_ids)
                gained = gained[: end + 1]
                request.finished = FinishReason.STOP
            admission = None if request.generated else Admission(request.cached_tokens or 0, request.waited)
            request.generated += gained
            if request.finished is None and len(request.generated) >= request.max_tokens:
                request.finished = FinishReason.LENGTH
            details = logprobs[index][: len(gained)] if request.num_logprobs is not None else ()
            kept = (logits[index].copy(),) if request.keep_logits else ()
            embedding = embeddings[index].copy() if request.keep_embedding else None
            updates.append(
                Update(
                    request,
                    gained,
                    details,
                    request.finished,
                    logits=kept,
                    context=context,
                    admission=admission,
                    embedding=embedding,
                )
            )
            if request.slot is not None:
                # The last token's key and value are not written yet.
                self._register(request, request.total - 1)
            if request.finished is not None:
                self._remove(request)
        return updates

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
        self._owed -= -(-request.limit // self.pool.page_size) - len(request.pages)
        self.pool.release(request.pages)
        self._free_slots.append(request.slot)
        self.running.remove(request)
        request.pages = []
        request.slot = None
