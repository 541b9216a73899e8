"""The scheduler in front of a device made of dictionaries.

The device computes what a model would in one respect: what it writes at a position depends on everything before that
position, as far as it is readable through the row's page table, and so does the token that it draws. A page that is
shared wrongly, is stale or was copied too early therefore changes tokens, or is noticed when it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from trtllm_jax.engine.block_pool import PADDING_PAGE, BlockPool
from trtllm_jax.engine.cache_manager import Group, KVCacheManager, pool_pages
from trtllm_jax.engine.limits import CapacityPolicy, SchedulerLimits
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import FinishReason, Request, TokenLogprobs, Update
from trtllm_jax.engine.row_state import sampling_arrays
from trtllm_jax.engine.sampling import Sampling
from trtllm_jax.engine.scheduler import Scheduler
from trtllm_jax.engine.step_output import StepOutput
from trtllm_jax.nn.reach import EVERYTHING, Reach

VOCAB = 24
NO_EVICT, UTILIZATION = CapacityPolicy.GUARANTEED_NO_EVICT, CapacityPolicy.MAX_UTILIZATION


def make_request(
    prompt: Sequence[int],
    max_tokens: int,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    num_logprobs: int | None = None,
    salt: bytes = b"",
    parent: Request | None = None,
    **more: Any,
) -> Request:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, greedy=False)
    return Request(list(prompt), max_tokens, sampling, frozenset(stop_ids), num_logprobs, salt, parent, **more)


def draw_token(request: Request, position: int, context: int) -> int:
    return hash((request.sampling.seed, position, context)) % VOCAB


@cache
def unstopped(request: Request) -> list[int]:
    """All tokens up to the limit, computed without a scheduler, pages or other sequences."""
    context = empty_context(request)
    tokens = list(request.prompt)
    for position in range(request.limit):
        if position >= len(request.prompt):
            tokens.append(draw_token(request, position, context))
        context = hash((context, tokens[position]))
    return tokens


def generate_alone(request: Request) -> tuple[list[int], FinishReason]:
    generated = unstopped(request)[len(request.prompt) :]
    for length, token in enumerate(generated, start=1):
        if token in request.stop_ids:
            return generated[:length], FinishReason.STOP
    return generated, FinishReason.LENGTH


@cache
def device_stops(request: Request) -> list[int]:
    return sampling_arrays([request])["stop_ids"][0].tolist()


@cache
def logits_after(request: Request) -> list[int]:
    """What the device's logits are after each token: here the sum of what it read."""
    context, sums = empty_context(request), []
    for token in unstopped(request):
        context = hash((context, token))
        sums.append(context)
    return sums


def empty_context(request: Request) -> int:
    """Other salts stand for other weights, so that a prefix found across salts gives other tokens."""
    return int.from_bytes(request.salt, "big")


def pages_of(request: Request, group: int = 0) -> list[int]:
    """The pages that a running sequence holds in a group, by column."""
    assert request.blocks is not None
    return request.blocks.pages[group]


def seen_from(reach: Reach, position: int) -> list[int]:
    """The positions that the token at a position reads, its own included."""
    window, chunk = reach.window or position + 1, reach.chunk or position + 1
    return [key for key in range(position + 1) if position - key < window and key // chunk == position // chunk]


class Entry(NamedTuple):
    """What a page holds at one offset: `context` sums up this token and all before it, `weights` is the
    oldest that any of them was computed with."""

    position: int
    token: int
    context: int
    weights: int


@dataclass
class Row:
    token: int = -1
    position: int = -1
    done: bool = True


class Device:
    """Carries out plans in order."""

    def __init__(self, setup: Setup) -> None:
        self.page_size = setup.page_size
        self.reaches = setup.reaches
        self.tokens_per_iteration = setup.limits.max_tokens_per_iteration
        self.rows = [Row() for _ in range(setup.limits.max_batch_size)]
        self.page_tables: list[dict[int, list[int]]] = [{} for _ in self.reaches]
        self.pages: list[dict[int, dict[int, Entry]]] = [{} for _ in self.reaches]
        self.prompt_tokens = 0
        self.weights = 0
        self.oldest: dict[Request, int] = {}
        self.logits: list[np.ndarray] = []
        """Of each row of the last ragged step, as far as they are wanted."""

    def execute(self, plan: StepPlan, weights: int) -> list[list[int]]:
        self.weights = weights
        for request in plan.requests:
            self.oldest.setdefault(request, weights)
        for pages, copies in zip(self.pages, plan.copies, strict=False):
            contents = [dict(pages[source]) for source, _ in copies]
            for (_, destination), content in zip(copies, contents, strict=True):
                pages[destination] = content
        for tables, rows in zip(self.page_tables, plan.page_tables, strict=False):
            tables |= dict(zip(plan.slots.tolist(), rows.tolist(), strict=True))
        for tables, rows in zip(self.page_tables, plan.newest_pages, strict=False):
            for slot, newest in zip(plan.slots.tolist(), rows.tolist(), strict=True):
                for column, page in newest:
                    tables[slot][column] = page
        return self._ragged(plan) if plan.kind == "ragged" else self._decode(plan)

    def _ragged(self, plan: StepPlan) -> list[list[int]]:
        """Every row's tokens are written before any row reads, as in each layer of a model."""
        lengths = []
        for index, request in enumerate(plan.requests):
            row, tokens = self.rows[plan.slots[index]], plan.tokens[plan.starts[index] : plan.starts[index + 1]]
            first = int(plan.first[index])
            if first < 0:
                assert tokens.tolist() == [-1], "only a decoding row's token is left to the device"
                first, tokens = row.position, [row.token]
                if row.done:
                    lengths.append(0)
                    continue
            elif first < request.prefill_end:
                self.prompt_tokens += len(tokens)
            for position, token in enumerate(tokens, start=first):
                self._write(request, int(plan.slots[index]), position, int(token))
            lengths.append(first + len(tokens))
        gained: list[list[int]] = []
        self.logits = [np.zeros(0)] * len(lengths)
        for index, length in enumerate(lengths):
            if length and (plan.emits[index] or plan.context[index]):
                self.logits[index] = np.array(self._read(plan, index, length))
            emits = length and plan.emits[index]
            gained.append([self._emit(plan, index, length)] if emits else [])
        return gained

    def _decode(self, plan: StepPlan) -> list[list[int]]:
        gained: list[list[int]] = [[] for _ in plan.requests]
        for _ in range(plan.steps):
            active = [index for index, slot in enumerate(plan.slots) if not self.rows[slot].done]
            for index in active:
                gained[index] += self._iterate(plan, index)
        return gained

    def _iterate(self, plan: StepPlan, index: int) -> list[int]:
        """What a row gains in one iteration: as many tokens as chance has it, up to the row's end."""
        slot, gained = int(plan.slots[index]), []
        for _ in range(1 + hash(self.rows[slot].position) % self.tokens_per_iteration):
            row = self.rows[slot]
            self._write(plan.requests[index], slot, row.position, row.token)
            gained.append(self._emit(plan, index, row.position + 1))
            if self.rows[slot].done:
                break
        return gained

    def _write(self, request: Request, slot: int, position: int, token: int) -> None:
        for group, pages in enumerate(self.pages):
            before, weights = self._before(request, group, slot, position)
            page, offset = self.page_tables[group][slot][position // self.page_size], position % self.page_size
            assert page != PADDING_PAGE, "a real token is written to the padding page"
            pages.setdefault(page, {})[offset] = Entry(position, token, hash((before, token)), weights)

    def _before(self, request: Request, group: int, slot: int, position: int) -> tuple[int, int]:
        """What the tokens before a position sum up to, and the oldest weights of any of them.

        The group itself knows where it sees the last of them; else another one does that sees it. Where none does, what
        is written should not depend on it, and only stands for the sequence.
        """
        if not position:
            return empty_context(request), self.weights
        for one in (group, *range(len(self.reaches))):
            if position - 1 in seen_from(self.reaches[one], position):
                entry = self._entry(one, slot, position - 1)
                return entry.context, min(self.weights, entry.weights)
        return logits_after(request)[position - 1], self.weights

    def _entry(self, group: int, slot: int, position: int) -> Entry:
        page = self.pages[group][self.page_tables[group][slot][position // self.page_size]]
        entry = page[position % self.page_size]
        assert entry.position == position, "the page holds another part of a sequence"
        return entry

    def _emit(self, plan: StepPlan, index: int, length: int) -> int:
        """Draw the token after the first `length`; for a sequence whose logits the host changes, a wrong one."""
        request = plan.requests[index]
        token = draw_token(request, length, self._read(plan, index, length))
        if request.needs_host_token:
            token = (token + 1) % VOCAB
        done = token in device_stops(request) or length + 1 >= request.limit
        self.rows[plan.slots[index]] = Row(token, length, done)
        return token

    def _read(self, plan: StepPlan, index: int, length: int) -> int:
        """The first `length` tokens, summed up; what each group still sees is compared with what belongs there."""
        request, slot = plan.requests[index], int(plan.slots[index])
        contexts, known = logits_after(request), unstopped(request)
        for group, reach in enumerate(self.reaches):
            for position in seen_from(reach, length - 1):
                entry = self._entry(group, slot, position)
                expected = (known[position], contexts[position])
                assert (entry.token, entry.context) == expected, "the page holds another sequence"
                assert entry.weights >= self.oldest[request], "the page is older than the weights it started with"
        return contexts[length - 1]


@dataclass(frozen=True)
class Setup:
    limits: SchedulerLimits
    page_size: int
    pages: int
    policy: CapacityPolicy = NO_EVICT
    reuse: bool = True
    overlap_scheduling: bool = True
    reaches: tuple[Reach, ...] = (EVERYTHING,)


class Simulation:
    """The engine's loop around a scheduler, with every promise of the scheduler checked at each step."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        sizes = [pool_pages(reach, setup.pages + 1, setup.limits, setup.page_size) for reach in setup.reaches]
        self.groups = [
            Group(BlockPool(pages, setup.page_size, reuse=setup.reuse), reach)
            for pages, reach in zip(sizes, setup.reaches, strict=True)
        ]
        self.scheduler = Scheduler(setup.limits, KVCacheManager(setup.limits, self.groups), setup.policy)
        self.device = Device(setup)
        self.requests: list[Request] = []
        self.updates: dict[Request, list[Update]] = {}
        self.plans: list[StepPlan] = []
        self.admitted: list[Request] = []
        self.flight: StepPlan | None = None
        self.weights = 0
        self.weights_of: dict[int, int] = {}
        self.failing: dict[Request, int] = {}

    def submit(self, *requests: Request) -> None:
        for request in requests:
            assert request.limit <= self.setup.limits.max_seq_len
            self.requests.append(request)
            self.updates[request] = []
            self.scheduler.submit(request)

    def finish(self, request: Request, reason: FinishReason = FinishReason.CANCELLED) -> None:
        ended = request.finished
        update = self.scheduler.finish(request, reason)
        assert (update is None) == (ended is not None)
        if update:
            self._record([update])
        self._check_pool()

    def update_weights(self) -> None:
        self.weights += 1
        self.scheduler.begin_weights()
        self._check_pool()

    def step(self) -> None:
        """One turn of `Engine._loop`."""
        plan = self.scheduler.schedule()
        self._check_pool()
        assert plan or self.flight or not self.scheduler.has_work, "deadlock"
        if plan:
            self.plans.append(plan)
            self.weights_of[id(plan)] = self.weights
            self.admitted += [request for request in dict.fromkeys(plan.requests) if request not in self.admitted]
            self._check_plan(plan)
        if self.flight:
            self._commit(self.flight)
        self.flight = plan
        if plan and not self.setup.overlap_scheduling:
            self._commit(plan)
            self.flight = None

    def run(self, steps: int) -> None:
        """To the end of all work, in at most so many steps; then everything must be given back."""
        for _ in range(steps):
            if not self.scheduler.has_work and not self.flight:
                break
            self.step()
        unfinished = [index for index, request in enumerate(self.requests) if request.finished is None]
        assert not unfinished, f"sequences {unfinished} did not end in {steps} steps"
        if self.flight:
            self.step()
        assert self.flight is None
        assert not self.scheduler.has_work
        assert self.scheduler.cache.stats.used == 0
        assert not any(group.reserved for group in self.groups)
        self._check_pool()
        for request in self.requests:
            self._check_result(request)
        self._check_counters()
        # Only samples of one prompt wait for their first, while others may overtake them.
        first_come = [request for request in self.requests if not request.parent]
        assert [request for request in self.admitted if not request.parent] == [
            request for request in first_come if request in self.admitted
        ]

    def _commit(self, plan: StepPlan) -> None:
        # Only now, so that a plan which changes after it was handed out is noticed.
        tokens = self.device.execute(plan, self.weights_of[id(plan)])
        logits = {row: self.device.logits[row] for row in plan.rows_with("logits")}
        for row in (*plan.edited, *plan.drawn_on_host):
            request = plan.requests[row]
            running = request.finished is None
            tokens[row] = [draw_token(request, request.total, self.device.logits[row].item())] if running else []
        logprobs = {
            row: [TokenLogprobs(token, -0.5, 1, ()) for token in tokens[row]]
            for row, request in enumerate(plan.requests)
            if request.num_logprobs is not None
        }
        failing = {row: error for row, error in self._failures(plan).items() if tokens[row]}
        self._record(self.scheduler.commit(plan, StepOutput(tokens, {"logprobs": logprobs, "logits": logits}, failing)))
        self._check_pool()

    def _failures(self, plan: StepPlan) -> dict[int, Exception]:
        """What its changes bring about: the end of a sequence in `failing` after so many tokens."""
        return {
            row: ArithmeticError()
            for row in (*plan.edited, *plan.drawn_on_host)
            if self.failing.get(plan.requests[row]) == len(plan.requests[row].generated)
        }

    def _record(self, updates: Sequence[Update]) -> None:
        for update in updates:
            assert not any(earlier.finish for earlier in self.updates[update.request]), "an update after the end"
            self.updates[update.request].append(update)

    def _check_pool(self) -> None:
        self.scheduler.cache.check(self.scheduler.running)
        assert not any(request.blocks for request in self.scheduler.waiting)
        most = self.setup.limits.max_step_tokens
        for request in self.scheduler.running:
            assert request.blocks is not None
            assert request.computed_min <= request.computed_max
            for group, pages in zip(self.groups, request.blocks.pages, strict=True):
                assert len(pages) <= -(-request.limit // self.setup.page_size), "pages that it can never fill"
                limit = group.reach.window or group.reach.chunk
                if limit is not None:
                    held = sum(page != PADDING_PAGE for page in pages)
                    assert held <= 2 + (limit + most) // self.setup.page_size, "pages that nobody reads"
        if self.setup.policy is NO_EVICT:
            assert self.scheduler.counters.preempted == 0

    def _check_plan(self, plan: StepPlan) -> None:
        limits, rows = self.setup.limits, len(plan.requests)
        assert 1 <= rows <= limits.max_batch_size
        firsts = [index for index, request in enumerate(plan.requests) if request not in plan.requests[:index]]
        assert len(set(plan.slots.tolist())) == len(firsts)
        assert plan.slots.tolist() == [request.slot for request in plan.requests]
        width = -(-limits.max_seq_len // self.setup.page_size)
        assert all(request.finished is None for request in plan.requests)
        if plan.kind == "decode":
            assert len(firsts) == rows
            assert not any(request.needs_host_token for request in plan.requests), "what it draws from is not known yet"
            assert 1 <= plan.steps <= limits.max_decode_steps
            assert not plan.penalised, "who is admitted has a prompt to compute"
            assert not plan.copies
            for group, of_rows in enumerate(plan.newest_pages):
                held = [pages_of(request, group) for request in plan.requests]
                assert of_rows[:, -1].tolist() == [[len(pages) - 1, pages[-1]] for pages in held]
        else:
            for group, table in enumerate(plan.page_tables):
                held = [pages_of(request, group) for request in plan.requests]
                assert table.tolist() == [pages + [PADDING_PAGE] * (width - len(pages)) for pages in held]
            assert plan.steps == 1
            assert 1 <= len(plan.tokens) <= limits.max_num_tokens
            assert plan.starts[0] == 0
            assert plan.starts[-1] == len(plan.tokens)
            assert (plan.starts[1:] > plan.starts[:-1]).all(), "a row without a token"
            for request, (first, *others) in itertools.groupby(range(rows), key=lambda index: plan.requests[index]):
                self._check_rows(plan, request, [first, *others])

    @staticmethod
    def _check_rows(plan: StepPlan, request: Request, rows: list[int]) -> None:
        """Those of one sequence: one, or one a token of a prompt whose logits are reported."""
        assert len(rows) == 1 or ("context_logits" in request.reports)
        assert not any(plan.emits[rows[:-1]]), "only its last row draws"
        assert ("context_logits" in request.reports) or not plan.context[rows].any()
        first = int(plan.first[rows[0]])
        if first < 0:
            assert not request.needs_host_token, "its token is the host's to send"
            return
        tokens = plan.tokens[plan.starts[rows[0]] : plan.starts[rows[-1] + 1]].tolist()
        assert tokens == request.tokens(first, first + len(tokens))
        if len(rows) > 1:
            assert plan.first[rows].tolist() == [*range(first, first + len(rows))]
        if first >= request.prefill_end:
            assert request.needs_host_token
            assert (request.in_flight, first) == (1, request.total - 1), "one step in flight, for its newest token"

    def _check_result(self, request: Request) -> None:
        updates = self.updates[request]
        expected, reason = generate_alone(request)
        told = [token for update in updates for token in update.tokens]
        assert told == request.generated
        assert [update.finish for update in updates if update.finish] == [request.finished]
        if request.num_logprobs is not None:
            assert [entry.token for update in updates for entry in update.outputs.get("logprobs", ())] == told
        else:
            assert not any("logprobs" in update.outputs for update in updates)
        sums = logits_after(request)
        context = [logits.item() for update in updates for logits in update.outputs.get("context_logits", ())]
        reports_context = "context_logits" in request.reports
        assert context == (sums[: len(context)] if reports_context else [])
        assert len(context) == (len(request.prompt) if told and reports_context else len(context))
        drawn_from = [logits.item() for update in updates for logits in update.outputs.get("generation_logits", ())]
        assert drawn_from == (
            sums[len(request.prompt) - 1 :][: len(told)] if ("generation_logits" in request.reports) else []
        )
        if request in self.failing and len(told) >= self.failing[request]:
            assert len(told) == self.failing[request]
            assert isinstance(updates[-1].error, ArithmeticError) or request.finished is not FinishReason.CANCELLED
        if request.finished is FinishReason.CANCELLED:
            assert told == expected[: len(told)]
        else:
            assert (told, request.finished) == (expected, reason)

    def _check_counters(self) -> None:
        counters, cache, page_size = self.scheduler.counters, self.scheduler.cache.stats, self.setup.page_size
        admitted = [request for request in self.requests if request.cached_tokens is not None]
        cached = [request.cached_tokens or 0 for request in admitted]
        assert counters.completed == len(self.requests)
        assert cache.reused == sum(tokens // page_size for tokens in cached)
        assert cache.reused + cache.missed == sum(-(-len(request.prompt) // page_size) for request in admitted)
        assert all(0 <= tokens < len(request.prompt) for tokens, request in zip(cached, admitted, strict=True))
        if not self.setup.reuse:
            assert not any(request.cached_tokens for request in self.requests if not request.parent)
        if not counters.preempted:
            assert self.device.prompt_tokens <= sum(len(request.prompt) for request in admitted) - sum(cached)
