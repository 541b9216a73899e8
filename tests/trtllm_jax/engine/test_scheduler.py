"""The scheduler in front of a device made of dictionaries.

The device computes what a model would in one respect: what it writes at a position depends on everything before that
position, as far as it is readable through the row's page table, and so does the token that it draws. A page that is
shared wrongly, is stale or was copied too early therefore changes tokens, or is noticed when it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtllm_jax.engine.block_pool import PADDING_PAGE, BlockPool
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import FinishReason, Request, TokenLogprobs, Update
from trtllm_jax.engine.row_state import wish_arrays
from trtllm_jax.engine.scheduler import CapacityPolicy, Scheduler, SchedulerLimits
from trtllm_jax.sampling_params import Sampling

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
) -> Request:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, greedy=False)
    return Request(list(prompt), max_tokens, sampling, frozenset(stop_ids), num_logprobs, salt, parent)


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
    return wish_arrays([request])["stop_ids"][0].tolist()


def empty_context(request: Request) -> int:
    """Other salts stand for other weights, so that a prefix found across salts gives other tokens."""
    return int.from_bytes(request.salt, "big")


class Entry(NamedTuple):
    """What a page holds at one offset; `context` sums up this token and all before it."""

    position: int
    token: int
    context: int


@dataclass
class Row:
    token: int = -1
    position: int = -1
    done: bool = True


class Device:
    """Carries out plans in order."""

    def __init__(self, slots: int, page_size: int) -> None:
        self.page_size = page_size
        self.rows = [Row() for _ in range(slots)]
        self.pages: dict[int, dict[int, Entry]] = {}
        self.prompt_tokens = 0

    def execute(self, plan: StepPlan) -> list[list[int]]:
        contents = [dict(self.pages[source]) for source, _ in plan.copies]
        for (_, destination), content in zip(plan.copies, contents, strict=True):
            self.pages[destination] = content
        return self._ragged(plan) if plan.kind == "step" else self._decode(plan)

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
            else:
                self.prompt_tokens += len(tokens)
            for position, token in enumerate(tokens, start=first):
                self._write(request, plan.page_table[index], position, int(token))
            lengths.append(first + len(tokens))
        gained: list[list[int]] = []
        for index, (request, length) in enumerate(zip(plan.requests, lengths, strict=True)):
            emits = length and plan.emits[index]
            gained.append([self._emit(request, plan, index, length)] if emits else [])
        return gained

    def _decode(self, plan: StepPlan) -> list[list[int]]:
        gained: list[list[int]] = [[] for _ in plan.requests]
        for _ in range(plan.steps):
            active = [index for index, slot in enumerate(plan.slots) if not self.rows[slot].done]
            for index in active:
                row = self.rows[plan.slots[index]]
                self._write(plan.requests[index], plan.page_table[index], row.position, row.token)
            for index in active:
                length = self.rows[plan.slots[index]].position + 1
                gained[index].append(self._emit(plan.requests[index], plan, index, length))
        return gained

    def _write(self, request: Request, page_table: Sequence[int], position: int, token: int) -> None:
        before = empty_context(request)
        if position:
            before = self._entry(page_table, position - 1).context
        page, offset = int(page_table[position // self.page_size]), position % self.page_size
        assert page != PADDING_PAGE, "a real token is written to the padding page"
        self.pages.setdefault(page, {})[offset] = Entry(position, token, hash((before, token)))

    def _entry(self, page_table: Sequence[int], position: int) -> Entry:
        page = self.pages[int(page_table[position // self.page_size])]
        entry = page[position % self.page_size]
        assert entry.position == position, "the page holds another part of a sequence"
        return entry

    def _emit(self, request: Request, plan: StepPlan, index: int, length: int) -> int:
        context = empty_context(request)
        known = unstopped(request)
        for position in range(length):
            entry = self._entry(plan.page_table[index], position)
            context = hash((context, entry.token))
            assert (entry.token, entry.context) == (known[position], context), "the page holds another sequence"
        token = draw_token(request, length, context)
        done = token in device_stops(request) or length + 1 >= request.limit
        self.rows[plan.slots[index]] = Row(token, length, done)
        return token


@dataclass(frozen=True)
class Setup:
    limits: SchedulerLimits
    page_size: int
    pages: int
    policy: CapacityPolicy = NO_EVICT
    reuse: bool = True
    look_ahead: bool = True


class Simulation:
    """The engine's loop around a scheduler, with every promise of the scheduler checked at each step."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.pool = BlockPool(setup.pages + 1, setup.page_size, reuse=setup.reuse)
        self.scheduler = Scheduler(setup.limits, self.pool, setup.policy)
        self.device = Device(setup.limits.max_batch_size, setup.page_size)
        self.requests: list[Request] = []
        self.updates: dict[Request, list[Update]] = {}
        self.plans: list[StepPlan] = []
        self.admitted: list[Request] = []
        self.flight: StepPlan | None = None

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

    def step(self) -> None:
        """One turn of `Engine._loop`."""
        plan = self.scheduler.schedule()
        self._check_pool()
        assert plan or self.flight or not self.scheduler.has_work, "deadlock"
        if plan:
            self.plans.append(plan)
            self.admitted += [request for request in plan.requests if request not in self.admitted]
            self._check_plan(plan)
        if self.flight:
            self._commit(self.flight)
        self.flight = plan
        if plan and not self.setup.look_ahead:
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
        assert self.pool.used == 0
        self.pool.check([])
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
        tokens = self.device.execute(plan)
        logprobs = [[TokenLogprobs(token, -0.5, 1, ()) for token in gained] for gained in tokens]
        self._record(self.scheduler.commit(plan, tokens, logprobs if plan.wants_logprobs else None))
        self._check_pool()

    def _record(self, updates: Sequence[Update]) -> None:
        for update in updates:
            assert not any(earlier.finish for earlier in self.updates[update.request]), "an update after the end"
            self.updates[update.request].append(update)

    def _check_pool(self) -> None:
        self.pool.check(request.pages for request in self.scheduler.running)
        assert not any(request.pages for request in self.scheduler.waiting)
        for request in self.scheduler.running:
            assert len(request.pages) <= -(-request.limit // self.setup.page_size), "pages that it can never fill"
        if self.setup.policy is NO_EVICT:
            assert self.scheduler.counters.preempted == 0

    def _check_plan(self, plan: StepPlan) -> None:
        limits, rows = self.setup.limits, len(plan.requests)
        assert 1 <= rows <= limits.max_batch_size
        assert len(set(plan.slots.tolist())) == len(set(plan.requests)) == rows
        width = -(-limits.max_seq_len // self.setup.page_size)
        padded = [request.pages + [PADDING_PAGE] * (width - len(request.pages)) for request in plan.requests]
        assert plan.page_table.tolist() == padded
        assert all(request.finished is None for request in plan.requests)
        if plan.kind == "decode":
            assert 1 <= plan.steps <= limits.max_decode_steps
            assert not plan.wants_logprobs, "only a ragged step tells log-probabilities"
            assert not plan.copies
        else:
            assert plan.steps == 1
            assert 1 <= len(plan.tokens) <= limits.max_num_tokens
            assert plan.starts[0] == 0
            assert plan.starts[-1] == len(plan.tokens)
            assert (plan.starts[1:] > plan.starts[:-1]).all(), "a row without a token"

    def _check_result(self, request: Request) -> None:
        updates = self.updates[request]
        expected, reason = generate_alone(request)
        told = [token for update in updates for token in update.tokens]
        assert told == request.generated
        assert [update.finish for update in updates if update.finish] == [request.finished]
        if request.num_logprobs is not None:
            assert [entry.token for update in updates for entry in update.logprobs] == told
        else:
            assert not any(update.logprobs for update in updates)
        if request.finished is FinishReason.CANCELLED:
            assert told == expected[: len(told)]
        else:
            assert (told, request.finished) == (expected, reason)

    def _check_counters(self) -> None:
        counters, page_size = self.scheduler.counters, self.setup.page_size
        admitted = [request for request in self.requests if request.cached_tokens is not None]
        cached = [request.cached_tokens or 0 for request in admitted]
        assert counters.completed == len(self.requests)
        assert counters.reused_pages == sum(tokens // page_size for tokens in cached)
        assert counters.reused_pages + counters.missed_pages == sum(
            -(-len(request.prompt) // page_size) for request in admitted
        )
        assert all(0 <= tokens < len(request.prompt) for tokens, request in zip(cached, admitted, strict=True))
        if not self.setup.reuse:
            assert not any(request.cached_tokens for request in self.requests if not request.parent)
        if not counters.preempted:
            assert self.device.prompt_tokens <= sum(len(request.prompt) for request in admitted) - sum(cached)


@dataclass(frozen=True)
class Arrival:
    """Samples of one prompt, when they come, and when one of them is ended from outside."""

    prompt: tuple[int, ...]
    max_tokens: int
    samples: int
    stop_ids: tuple[int, ...]
    num_logprobs: int | None
    salt: bytes
    step: int
    cancel: tuple[int, int] | None

    def requests(self, first_seed: int) -> list[Request]:
        made: list[Request] = []
        for seed in range(first_seed, first_seed + self.samples):
            parent = made[0] if made else None
            made.append(
                make_request(self.prompt, self.max_tokens, seed, self.stop_ids, self.num_logprobs, self.salt, parent)
            )
        return made


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    page_size = draw(st.integers(1, 5))
    max_seq_len = draw(st.integers(2, 30))
    batch = draw(st.integers(1, 5))
    pages = -(-max_seq_len // page_size) + draw(st.sampled_from([0, 1, 2, 4, 12]))
    return Setup(
        limits=SchedulerLimits(
            max_batch_size=min(batch, pages),
            max_num_tokens=batch + draw(st.integers(0, 12)),
            max_seq_len=max_seq_len,
            max_decode_steps=draw(st.integers(1, 8)),
        ),
        page_size=page_size,
        pages=pages,
        policy=draw(st.sampled_from(CapacityPolicy)),
        reuse=draw(st.booleans()),
        look_ahead=draw(st.booleans()),
    )


@st.composite
def arrivals(draw: st.DrawFn, max_seq_len: int) -> Arrival:
    """Prompts are cut from few texts, so that many share a beginning."""
    text = draw(st.sampled_from([[1] * 30, [1, 2] * 15, [*range(15), *range(15)]]))
    length = draw(st.integers(1, max_seq_len - 1))
    samples = draw(st.sampled_from([1, 1, 1, 2, 4]))
    return Arrival(
        prompt=(*text[: length - 1], draw(st.integers(0, 2))),
        max_tokens=draw(st.integers(1, max_seq_len - length)),
        samples=samples,
        stop_ids=tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=12)) if draw(st.booleans()) else ()),
        num_logprobs=draw(st.sampled_from([None, None, None, 0, 2])),
        salt=draw(st.sampled_from([b"", b"", b"s"])),
        step=draw(st.integers(0, 20)),
        cancel=draw(st.none() | st.tuples(st.integers(0, samples - 1), st.integers(0, 15))),
    )


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Setup, list[Arrival]]:
    setup = draw(setups())
    return setup, draw(st.lists(arrivals(setup.limits.max_seq_len), min_size=1, max_size=8))


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(workloads())
def test_every_sequence_gets_the_tokens_it_would_get_alone(workload: tuple[Setup, list[Arrival]]) -> None:
    setup, wanted = workload
    simulation = Simulation(setup)
    events: list[tuple[int, Callable[[], None]]] = []
    tokens = 0
    for index, arrival in enumerate(wanted):
        requests = arrival.requests(first_seed=10 * index)
        tokens += sum(request.limit for request in requests)
        events.append((arrival.step, lambda requests=requests: simulation.submit(*requests)))
        if arrival.cancel:
            sample, later = arrival.cancel
            events.append((arrival.step + later, lambda one=requests[sample]: simulation.finish(one)))
    for now in range(max(step for step, _ in events) + 1):
        for step, event in events:
            if step == now:
                event()
        simulation.step()
    # One after another every token takes a step or two; a sequence that is stopped computes its tokens again.
    simulation.run(steps=10 + 3 * tokens)


def setup_of(
    pages: int = 32,
    page_size: int = 4,
    batch: int = 4,
    tokens: int = 64,
    length: int = 64,
    steps: int = 8,
    policy: CapacityPolicy = NO_EVICT,
    reuse: bool = True,
    look_ahead: bool = True,
) -> Setup:
    return Setup(SchedulerLimits(batch, tokens, length, steps), page_size, pages, policy, reuse, look_ahead)


def ran(setup: Setup, *requests: Request, steps: int = 1000) -> Simulation:
    simulation = Simulation(setup)
    simulation.submit(*requests)
    simulation.run(steps)
    return simulation


def preempted(simulation: Simulation) -> int:
    return simulation.scheduler.counters.preempted


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (19, 16)])
def test_a_prompt_seen_before_leaves_one_token_to_compute_at_least(length: int, cached: int) -> None:
    simulation = ran(setup_of(), make_request(range(length), 3))
    simulation.submit(again := make_request(range(length), 3, seed=1))
    simulation.run(100)
    assert again.cached_tokens == cached
    assert simulation.device.prompt_tokens == length + length - cached


def test_equal_prompts_of_one_step_share_what_the_first_computes() -> None:
    first, second = make_request(range(10), 3), make_request(range(10), 3, seed=1)
    simulation = ran(setup_of(), first, second)
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert simulation.plans[0].requests == (first, second)
    assert simulation.plans[0].page_table[0, :2].tolist() == simulation.plans[0].page_table[1, :2].tolist()


def test_an_answer_is_found_as_the_next_prompts_beginning() -> None:
    simulation = ran(setup_of(), turn := make_request(range(6), 7))
    simulation.submit(following := make_request([*turn.prompt, *turn.generated, 1, 2], 3))
    simulation.run(100)
    assert following.cached_tokens == 12  # 13 tokens, of which the last was never computed


def test_another_salt_finds_nothing() -> None:
    simulation = ran(setup_of(), make_request(range(12), 1, salt=b"one"))
    simulation.submit(
        other := make_request(range(12), 1, salt=b"other"), same := make_request(range(12), 1, salt=b"one")
    )
    simulation.run(100)
    assert (other.cached_tokens, same.cached_tokens) == (0, 8)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("length", "copies"), [(10, 3), (9, 0), (8, 3), (1, 0)])
def test_samples_of_one_prompt_compute_it_once(length: int, copies: int, reuse: bool) -> None:
    parent = make_request(range(length), 5)
    forks = [make_request(range(length), 5, seed, parent=parent) for seed in (1, 2, 3)]
    simulation = ran(setup_of(reuse=reuse), parent, *forks)
    assert [fork.cached_tokens for fork in forks] == [length - 1] * 3
    assert simulation.device.prompt_tokens == length + 3
    assert sum(len(plan.copies) for plan in simulation.plans) == copies


def test_samples_outlive_a_first_one_that_is_aborted_before_they_start() -> None:
    simulation = Simulation(setup_of())
    parent = make_request(range(10), 5)
    fork = make_request(range(10), 5, seed=1, parent=parent)
    simulation.submit(parent, fork)
    simulation.step()
    simulation.finish(parent)
    simulation.run(100)
    assert fork.cached_tokens == 8


def test_a_prompt_longer_than_a_step_is_computed_in_chunks_while_others_decode() -> None:
    simulation = Simulation(setup_of(tokens=5))
    simulation.submit(short := make_request([1], 20))
    simulation.step()
    simulation.submit(long := make_request(range(18), 2))
    for _ in range(5):
        simulation.step()
    chunks = [(plan.requests, len(plan.tokens), plan.emits.tolist()) for plan in simulation.plans[1:]]
    both = (short, long)
    assert chunks == [(both, 5, [True, False])] * 4 + [(both, 3, [True, True])]
    simulation.run(100)


def test_every_sequence_keeps_the_pages_of_its_longest_end_in_reserve() -> None:
    requests = [make_request([seed], 15, seed) for seed in range(4)]
    simulation = ran(setup_of(pages=8, steps=1), *requests)
    assert max(len(plan.requests) for plan in simulation.plans) == 2
    assert preempted(simulation) == 0


@pytest.mark.parametrize("steps", [1, 8])
def test_under_max_utilization_the_newest_makes_room_and_goes_on_first(steps: int) -> None:
    requests = [make_request([seed] * 4, 28, seed) for seed in range(4)]
    simulation = ran(setup_of(pages=8, length=32, steps=steps, policy=UTILIZATION), *requests)
    assert preempted(simulation)
    ends = [max(index for index, plan in enumerate(simulation.plans) if one in plan.requests) for one in requests]
    assert ends == sorted(ends)


def test_a_stopped_sequence_waits_for_its_tokens_in_flight() -> None:
    """Pages held for several steps make it shorter on the host than on the device, so that it would fit at once."""
    simulation = Simulation(setup_of(pages=26, page_size=1, length=26, policy=UTILIZATION))
    simulation.submit(make_request([1], 25), newest := make_request([2], 25, seed=1))
    held = known = 0
    while not preempted(simulation):
        held, known = len(newest.pages), newest.total
        simulation.step()
    assert held - 1 >= known + 1, "less the page it was stopped for, its pages do for its known tokens and a spare one"
    assert newest not in simulation.plans[-1].requests
    assert newest.total == known + 4
    simulation.run(100)


def test_samples_wait_for_a_first_one_that_is_computed_again() -> None:
    simulation = Simulation(setup_of(pages=10, page_size=2, length=20, batch=2, steps=1, policy=UTILIZATION))
    parent = make_request([3] * 4, 6)
    fork = make_request([3] * 4, 6, seed=1, parent=parent)
    simulation.submit(old := make_request([1] * 10, 10), parent, fork)
    while not preempted(simulation):
        simulation.step()
    assert (old.slot is not None, parent.slot, fork.cached_tokens) == (True, None, None)
    simulation.run(100)
    assert fork.cached_tokens == 3


def test_a_spare_page_for_each_running_sequence_keeps_an_admission_from_being_undone() -> None:
    simulation = Simulation(setup_of(pages=6, length=24, steps=1, policy=UTILIZATION))
    simulation.submit(old := make_request(range(12), 12))
    simulation.step()
    simulation.submit(new := make_request(range(50, 61), 1))
    simulation.step()
    assert (old.slot is not None, new.slot) == (True, None)
    simulation.run(100)
    assert preempted(simulation) == 0


@pytest.mark.parametrize(("tokens", "steps"), [(1, []), (2, [1]), (5, [4]), (9, [8]), (12, [8, 3])])
def test_one_dispatch_gains_a_row_as_many_tokens_as_it_may(tokens: int, steps: list[int]) -> None:
    simulation = ran(setup_of(), make_request([1], tokens))
    assert [(plan.kind, plan.steps) for plan in simulation.plans] == [("step", 1), *(("decode", n) for n in steps)]


def test_fewer_steps_are_taken_where_pages_are_short() -> None:
    requests = [make_request([seed], 11, seed) for seed in range(2)]
    simulation = ran(setup_of(pages=12, page_size=1, length=12, policy=UTILIZATION), *requests)
    assert [plan.steps for plan in simulation.plans[:2]] == [1, 4]


def test_a_log_probability_holds_every_row_to_one_token_a_step() -> None:
    simulation = ran(setup_of(), make_request([1], 4, num_logprobs=0), make_request([2], 4, seed=1))
    assert [(plan.kind, len(plan.requests)) for plan in simulation.plans] == [("step", 2)] * 4


def test_stop_ids_that_the_device_does_not_know_end_a_sequence_too() -> None:
    last = VOCAB - 1
    candidates = (make_request([1], 40, seed, stop_ids=[*range(8), last]) for seed in itertools.count())
    request = next(one for one in candidates if last in generate_alone(one)[0][10:])
    assert last not in device_stops(request)
    simulation = ran(setup_of(), request)
    assert (request.finished, request.generated[-1]) == (FinishReason.STOP, last)
    assert simulation.updates[request][-1].tokens[-1] == last


def test_a_row_that_ended_in_flight_brings_nothing_more() -> None:
    simulation = Simulation(setup_of())
    simulation.submit(request := make_request([1], 30), other := make_request([2], 30, seed=1))
    simulation.step()
    simulation.step()
    assert simulation.flight is not None
    assert request in simulation.flight.requests
    told = len(simulation.updates[request])
    simulation.finish(request, FinishReason.CANCELLED)
    simulation.finish(request, FinishReason.STOP)
    simulation.step()
    assert request not in simulation.plans[-1].requests
    assert len(simulation.updates[request]) == told + 1
    simulation.run(100)
    assert (request.finished, other.finished) == (FinishReason.CANCELLED, FinishReason.LENGTH)


def test_a_waiting_sequence_can_be_ended() -> None:
    simulation = Simulation(setup_of(batch=1))
    simulation.submit(make_request([1], 9), waiting := make_request([2], 9))
    simulation.step()
    simulation.finish(waiting)
    simulation.run(100)
    assert (waiting.generated, waiting.cached_tokens) == ([], None)
