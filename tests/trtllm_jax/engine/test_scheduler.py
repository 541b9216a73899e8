from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.cache_manager import Group, KVCacheManager
from trtllm_jax.engine.limits import CapacityPolicy, SchedulerLimits
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.request import FinishReason, Request
from trtllm_jax.engine.scheduler import Scheduler
from trtllm_jax.engine.step_output import StepOutput
from trtllm_jax.nn.reach import EVERYTHING, Reach

from .simulation import (
    NO_EVICT,
    UTILIZATION,
    VOCAB,
    Setup,
    Simulation,
    device_stops,
    generate_alone,
    make_request,
    pages_of,
)

ON_THE_HOST = LogitEdits(batched=True)
CONTEXT = frozenset({"context_logits"})

LIMITED = [
    (EVERYTHING, Reach(window=3)), (Reach(window=2), EVERYTHING), (Reach(window=5),),
    (Reach(window=4), Reach(window=9)), (EVERYTHING, Reach(chunk=3)), (Reach(chunk=4), EVERYTHING), (Reach(chunk=6),),
    (Reach(chunk=5), Reach(window=4)),
]  # fmt: skip
"""What the layers of models with several cache groups, or with one that does not keep all tokens, see."""


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
    edits: LogitEdits | None
    reports: frozenset[str]

    def requests(self, first_seed: int) -> list[Request]:
        made: list[Request] = []
        for seed in range(first_seed, first_seed + self.samples):
            parent = made[0] if made else None
            made.append(
                make_request(
                    self.prompt, self.max_tokens, seed, self.stop_ids, self.num_logprobs, self.salt, parent,
                    edits=self.edits, reports=self.reports - CONTEXT if made else self.reports,
                )
            )  # fmt: skip
        return made


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    page_size = draw(st.integers(1, 5))
    max_seq_len = draw(st.integers(2, 30))
    batch = draw(st.integers(1, 5))
    pages = -(-max_seq_len // page_size) + draw(st.sampled_from([0, 1, 2, 4, 12, 100]))
    reaches = st.sampled_from([(EVERYTHING,), (EVERYTHING,), *LIMITED])
    return Setup(
        limits=SchedulerLimits(
            max_batch_size=min(batch, pages),
            max_num_tokens=batch + draw(st.integers(0, 12)),
            max_seq_len=max_seq_len,
            max_decode_steps=draw(st.integers(1, 8)),
            max_tokens_per_iteration=draw(st.sampled_from([1, 1, 1, 2, 4])),
            fixed_decode_steps=draw(st.booleans()),
        ),
        reaches=draw(reaches),
        page_size=page_size,
        pages=pages,
        policy=draw(st.sampled_from(CapacityPolicy)),
        reuse=draw(st.booleans()),
        overlap_scheduling=draw(st.booleans()),
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
        edits=draw(st.sampled_from([None, None, LogitEdits(), LogitEdits(bad=((1, 2),)), LogitEdits(batched=True)])),
        reports=frozenset(draw(st.lists(st.sampled_from(["generation_logits", "context_logits"]), max_size=2))),
    )


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Setup, list[Arrival], list[int]]:
    setup = draw(setups())
    wanted = draw(st.lists(arrivals(setup.limits.max_seq_len), min_size=1, max_size=8))
    return setup, wanted, draw(st.just([]) | st.lists(st.integers(0, 25), min_size=1, max_size=3))


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(workloads())
def test_every_sequence_gets_the_tokens_it_would_get_alone(workload: tuple[Setup, list[Arrival], list[int]]) -> None:
    setup, wanted, updates = workload
    simulation = Simulation(setup)
    events: list[tuple[int, Callable[[], None]]] = [(step, simulation.update_weights) for step in updates]
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
    overlap_scheduling: bool = True,
) -> Setup:
    return Setup(SchedulerLimits(batch, tokens, length, steps), page_size, pages, policy, reuse, overlap_scheduling)


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
    (table,) = simulation.plans[0].page_tables
    assert table[0, :2].tolist() == table[1, :2].tolist()


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


def test_what_other_weights_computed_is_not_found() -> None:
    simulation = ran(setup_of(), make_request(range(12), 3))
    simulation.update_weights()
    simulation.submit(again := make_request(range(12), 3, seed=1))
    simulation.run(100)
    simulation.submit(third := make_request(range(12), 3, seed=2))
    simulation.run(100)
    assert (again.cached_tokens, third.cached_tokens) == (0, 8)


def test_a_sequence_that_outlives_its_weights_leaves_nothing_to_find() -> None:
    simulation = Simulation(setup_of(tokens=5))
    simulation.submit(before := make_request(range(18), 12))
    for _ in range(2):
        simulation.step()
    assert before.prefilling
    simulation.update_weights()
    simulation.run(100)
    simulation.submit(make_request(range(8), 1))  # whose pages the chain could go on from
    simulation.run(100)
    simulation.submit(after := make_request([*before.prompt, *before.generated], 3, seed=1))
    simulation.run(100)
    assert after.cached_tokens == 8


def test_samples_that_have_not_started_compute_the_prompt_with_new_weights() -> None:
    simulation = Simulation(setup_of(batch=2))
    parent = make_request(range(10), 9)
    forks = [make_request(range(10), 3, seed, parent=parent) for seed in (1, 2)]
    simulation.submit(parent, *forks)
    simulation.step()
    assert parent.slot is not None
    simulation.update_weights()
    simulation.run(100)
    assert [fork.cached_tokens for fork in forks] == [0, 8]


@pytest.mark.parametrize("reach", [EVERYTHING, Reach(window=3), Reach(chunk=8)], ids=["all", "window", "chunk"])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("length", "copies"), [(10, 3), (9, 0), (8, 3), (1, 0)])
def test_samples_of_one_prompt_compute_it_once(length: int, copies: int, reuse: bool, reach: Reach) -> None:
    """Also where the next token begins a chunk, so that the first sample reads nothing of the prompt any more."""
    parent = make_request(range(length), 5)
    forks = [make_request(range(length), 5, seed, parent=parent) for seed in (1, 2, 3)]
    simulation = ran(replace(setup_of(reuse=reuse), reaches=(reach, EVERYTHING)), parent, *forks)
    assert [fork.cached_tokens for fork in forks] == [length - 1] * 3
    assert simulation.device.prompt_tokens == length + 3
    assert sum(len(of_group) for plan in simulation.plans for of_group in plan.copies) == 2 * copies


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
        held, known = len(pages_of(newest)) if newest.blocks else 0, newest.total
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
    assert [(plan.kind, plan.steps) for plan in simulation.plans] == [("ragged", 1), *(("decode", n) for n in steps)]


def test_a_fixed_number_of_steps_is_taken_where_nobody_waits() -> None:
    setup = setup_of(batch=2, steps=4)
    setup = replace(setup, limits=replace(setup.limits, fixed_decode_steps=True))
    simulation = Simulation(setup)
    simulation.submit(first := make_request([1], 14), make_request([2], 40, seed=1), make_request([3], 9, seed=2))
    simulation.run(100)
    decoding = [plan for plan in simulation.plans if plan.kind == "decode"]
    assert {plan.steps for plan in decoding} == {1, 4}
    while_one_waits = [plan.steps for plan in decoding if first in plan.requests]
    assert set(while_one_waits) == {1}


@pytest.mark.parametrize("reach", [Reach(window=6), Reach(chunk=6)], ids=["window", "chunk"])
def test_pages_that_nobody_reads_any_more_are_given_back_while_a_sequence_runs(reach: Reach) -> None:
    """Of 30 tokens on 15 pages no more than what is seen and a step's are held: those of 6 tokens and of 4."""
    setup = replace(setup_of(pages=20, page_size=2, length=40, tokens=4, steps=4), reaches=(reach,))
    simulation = Simulation(setup)
    simulation.submit(request := make_request(range(20), 10))
    most = 0
    while request.finished is None:
        simulation.step()
        if request.blocks is not None:
            most = max(most, sum(page > 0 for page in pages_of(request)))
    assert most <= 6
    simulation.run(10)


def test_prompts_take_their_pages_for_one_step_only() -> None:
    """Six prompts of 57 tokens, one a step: the pool has room for six windows and the pages of one prompt."""
    setup = replace(
        setup_of(pages=1000, page_size=8, batch=6, tokens=63, length=128, steps=1), reaches=(Reach(window=3),)
    )
    simulation = Simulation(setup)
    (group,) = simulation.groups
    assert group.pool.capacity == 6 * 3 + 8
    simulation.submit(*(make_request([seed] * 57, 30, seed) for seed in range(6)))
    for _ in range(6):
        simulation.step()
    assert not simulation.scheduler.waiting
    assert not any(request.prefilling for request in simulation.scheduler.running)
    simulation.run(1000)


@pytest.mark.parametrize(
    ("reach", "column"),
    [(Reach(window=6), 5), (Reach(chunk=6), 6), (Reach(chunk=10), 5), (Reach(chunk=9), 4)],
    ids=["11 on", "12 on", "10 on", "9 on"],
)
def test_a_prefix_is_found_as_long_as_what_is_seen_of_it_is_held(reach: Reach, column: int) -> None:
    """What lies before may be lost: only a group that keeps every token needs it."""
    setup = replace(setup_of(pages=12, page_size=2, length=24), reaches=(reach,))
    simulation = ran(setup, make_request(range(16), 1))
    simulation.submit(again := make_request(range(18), 1, seed=1))
    simulation.run(100)
    assert again.cached_tokens == 16
    assert pages_of_prefix(simulation, again) == column, "the page with the first that the token at position 16 sees"


def test_a_prefix_that_ends_with_a_chunk_needs_no_page_of_it() -> None:
    """No token after it reads any of them, in whatever state they are; another group still needs its own."""
    other = make_request(range(30, 49), 1)
    alone = ran(replace(setup_of(page_size=2), reaches=(Reach(chunk=6),)), other)
    assert other.cached_tokens == 18, "where every layer is chunked, what is before the last chunk changes nothing"
    assert alone.device.prompt_tokens == 1
    beside = replace(setup_of(page_size=2), reaches=(Reach(chunk=6), EVERYTHING))
    simulation = ran(beside, first := make_request(range(19), 1))
    simulation.submit(again := make_request(range(20), 1, seed=1))
    simulation.run(100)
    assert (first.cached_tokens, again.cached_tokens) == (0, 18)


def pages_of_prefix(simulation: Simulation, request: Request) -> int:
    """The first column of the pages that a finished request's prefix was made of."""
    plan = next(plan for plan in simulation.plans if request in plan.requests)
    (table,) = plan.page_tables
    return int(np.flatnonzero(table[plan.requests.index(request)])[0])


def test_fewer_steps_are_taken_where_pages_are_short() -> None:
    requests = [make_request([seed], 11, seed) for seed in range(2)]
    simulation = ran(setup_of(pages=12, page_size=1, length=12, policy=UTILIZATION), *requests)
    assert [plan.steps for plan in simulation.plans[:2]] == [1, 4]


def test_extras_hold_nobody_up() -> None:
    """Log-probabilities and penalties are the decode loop's own: whoever has them gains as many tokens as others."""
    requests = [
        make_request([1], 17, num_logprobs=0),
        make_request([2], 17, seed=1),
        make_request([3], 17, edits=LogitEdits()),
    ]
    simulation = ran(setup_of(steps=8), *requests)
    assert [plan.kind for plan in simulation.plans] == ["ragged", "decode", "decode"]
    assert all(plan.requests == (*requests,) for plan in simulation.plans)
    assert [plan.extras for plan in simulation.plans] == [[0, 2]] * 3


def test_the_device_hears_of_penalties_whenever_a_sequence_takes_a_slot() -> None:
    requests = [make_request([seed] * 6, 26, seed, edits=LogitEdits() if seed % 2 else None) for seed in range(4)]
    simulation = ran(setup_of(pages=9, length=32, batch=4, tokens=6, steps=4, policy=UTILIZATION), *requests)
    assert preempted(simulation)
    told = [request for plan in simulation.plans for request in plan.penalised]
    assert set(told) == {request for request in requests if request.edits}
    assert len(told) > 2, "and again after it was stopped"


def test_what_the_host_draws_waits_for_its_commit_while_others_go_on() -> None:
    simulation = Simulation(setup_of())
    simulation.submit(edited := make_request([1], 9, edits=ON_THE_HOST), plain := make_request([2], 40, seed=1))
    for _ in range(6):
        simulation.step()
    assert [(plan.kind, plan.requests) for plan in simulation.plans] == [
        ("ragged", (edited, plain)),
        ("decode", (plain,)),
    ] * 3
    simulation.run(100)


def test_a_prompt_whose_logits_are_told_takes_the_rows_that_are_free() -> None:
    simulation = Simulation(setup_of(batch=5))
    simulation.submit(first := make_request([1], 30))
    simulation.step()
    simulation.submit(told := make_request(range(10), 2, seed=1, reports=CONTEXT))
    simulation.submit(later := make_request([3], 2, seed=2))
    simulation.run(100)
    rows = [plan.requests.count(told) for plan in simulation.plans if plan.context.any()]
    assert rows == [4, 4, 2]
    begun = [
        next(index for index, plan in enumerate(simulation.plans) if one in plan.requests) for one in (told, later)
    ]
    assert begun == [1, 3], "the next is admitted once a row is left"
    assert first.finished is FinishReason.LENGTH


def test_logits_of_a_prompt_are_told_once_though_it_is_computed_again() -> None:
    requests = [make_request([seed] * 6, 26, seed, reports=CONTEXT, edits=LogitEdits()) for seed in range(4)]
    simulation = ran(setup_of(pages=9, length=32, batch=4, tokens=6, steps=4, policy=UTILIZATION), *requests)
    assert preempted(simulation)
    for request in requests:
        assert sum(len(update.outputs.get("context_logits", ())) for update in simulation.updates[request]) == 6


def test_a_known_prompt_is_computed_where_its_logits_are_told() -> None:
    simulation = ran(setup_of(), make_request(range(12), 3))
    simulation.submit(told := make_request(range(12), 3, seed=1, reports=CONTEXT))
    simulation.run(100)
    simulation.submit(plain := make_request(range(12), 3, seed=2))
    simulation.run(100)
    assert (told.cached_tokens, plain.cached_tokens) == (0, 8)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_failure_ends_its_own_sequence(after: int) -> None:
    simulation = Simulation(setup_of())
    failing, other = (make_request([seed], 9, seed, edits=ON_THE_HOST) for seed in range(2))
    simulation.failing[failing] = after
    simulation.submit(failing, other)
    simulation.run(100)
    assert (failing.finished, len(failing.generated)) == (FinishReason.CANCELLED, after)
    assert isinstance(simulation.updates[failing][-1].error, ArithmeticError)
    assert other.finished is FinishReason.LENGTH


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


def test_prompts_whose_length_changes_their_keys_share_a_prefix_with_equals_only() -> None:
    """Dynamic rope: beyond a length the keys of a prompt depend on how long it is, and those of an answer too."""

    def found(stretch: int | None, *lengths: int, new: int = 1) -> list[int | None]:
        limits = SchedulerLimits(2, 64, 64, 1)
        scheduler = Scheduler(limits, KVCacheManager(limits, [Group(BlockPool(200, 4))], stretch))
        requests = [make_request(range(length), new) for length in lengths]
        for request in requests:
            scheduler.submit(request)
            while request.finished is None:
                plan = scheduler.schedule()
                assert plan is not None
                position = request.total
                scheduler.commit(
                    plan, StepOutput([[position] if emits else [] for emits in plan.emits] or [[position]])
                )
        return [request.cached_tokens for request in requests]

    assert found(None, 20, 30, 20) == [0, 20, 16]
    assert found(12, 20, 30, 20, 30) == [0, 0, 16, 28]
    assert found(12, 9, 12, 13, 12) == [0, 8, 0, 8]
    # What was generated beyond has keys of other lengths; what was not has not.
    assert found(None, 10, 30, new=20) == [0, 28]
    assert found(12, 10, 12, new=20) == [0, 8]
    assert found(40, 10, 30, new=20) == [0, 28]
