from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.cache_manager import Group, KVCacheManager
from trtllm_jax.engine.events import CacheEvents, iteration_stats
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.prefix import block_hash
from trtllm_jax.engine.request import Request
from trtllm_jax.engine.scheduler import Scheduler
from trtllm_jax.engine.step_output import StepOutput
from trtllm_jax.requests.sampling_params import SamplingParams


def make_scheduler(events: CacheEvents | None = None, pages: int = 8, batch: int = 4, reuse: bool = True) -> Scheduler:
    limits = SchedulerLimits(batch, 16, 32, 4)
    return Scheduler(limits, KVCacheManager(limits, [Group(BlockPool(pages + 1, 4, reuse=reuse, observer=events))]))


def make_request(prompt: Sequence[int], max_tokens: int = 1, salt: bytes = b"") -> Request:
    return Request(list(prompt), max_tokens, SamplingParams().resolved(), salt=salt)


def run(scheduler: Scheduler, *requests: Request) -> None:
    """To their end, with 0 for every token."""
    for request in requests:
        scheduler.submit(request)
    while plan := scheduler.schedule():
        commit(scheduler, plan)


def commit(scheduler: Scheduler, plan: StepPlan) -> None:
    counts = plan.emits.astype(int) if plan.kind == "ragged" else [plan.steps] * len(plan.requests)
    left = [request.max_tokens - len(request.generated) for request in plan.requests]
    gained = [[0] * min(count, most) for count, most in zip(counts, left, strict=True)]
    scheduler.commit(plan, StepOutput(gained))


def data_of(events: CacheEvents, kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in events.drain() if event["data"]["type"] == kind]


def test_the_cache_is_created_once_and_first() -> None:
    events = CacheEvents(10, pages=7)
    created = {"event_id": 0, "data": {"type": "created", "num_blocks_per_cache_level": [7, 0]}}
    assert events.drain() == [created]
    assert events.drain() == []


def test_stored_blocks_have_tensorrt_llms_form_and_name_the_block_before() -> None:
    events = CacheEvents(10, pages=8)
    run(make_scheduler(events), make_request([5, 6, 7, 8, 9, 10, 11, 12, 13]))
    first, second = data_of(events, "stored")
    (block,) = first["blocks"]
    assert first == {"type": "stored", "parent_hash": None, "blocks": [block]}
    assert block == {
        "type": "stored_block",
        "block_hash": block["block_hash"],
        "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in (5, 6, 7, 8)],
        "cache_level": 0,
        "priority": 35,
    }
    assert second["parent_hash"] == block["block_hash"]
    assert [token["token_id"] for token in second["blocks"][0]["tokens"]] == [9, 10, 11, 12]


def test_a_salt_changes_the_hashes_and_is_not_told() -> None:
    events = CacheEvents(10, pages=8)
    secret = b"password"
    scheduler = make_scheduler(events)
    run(scheduler, make_request(range(5)), make_request(range(5), salt=secret))
    plain, salted = data_of(events, "stored")
    assert plain["parent_hash"] is salted["parent_hash"] is None
    assert plain["blocks"][0]["block_hash"] != salted["blocks"][0]["block_hash"]
    assert plain["blocks"][0]["tokens"] == salted["blocks"][0]["tokens"]


def test_stored_and_removed_blocks_are_what_can_be_found() -> None:
    events = CacheEvents(1000, pages=8)
    scheduler = make_scheduler(events)
    known: set[int] = set()
    for first in (0, 10, 20, 0, 30):
        run(scheduler, make_request(range(first, first + 13)))
        for event in events.drain():
            data = event["data"]
            if data["type"] == "stored":
                (block,) = data["blocks"]
                assert data["parent_hash"] is None or data["parent_hash"] in known
                assert block["block_hash"] not in known
                known.add(block["block_hash"])
            elif data["type"] == "removed":
                assert known.issuperset(data["block_hashes"])
                known.difference_update(data["block_hashes"])
        blocks = [block_hash(b"", range(first, first + 4))]
        for start in (first + 4, first + 8):
            blocks.append(block_hash(blocks[-1], range(start, start + 4)))
        assert scheduler.cache.match(make_request(range(first, first + 13))).tokens == 12
        assert known.issuperset(int.from_bytes(block[:8], "big") for block in blocks)
        assert len(known) <= 8


def test_ids_rise_by_one_and_the_oldest_events_make_room() -> None:
    events = CacheEvents(3, pages=8)
    for number in range(5):
        events.removed(bytes([number] * 32))
    assert [event["event_id"] for event in events.drain()] == [3, 4, 5]
    events.removed(b"\x01" * 32)
    (event,) = events.drain()
    assert event == {"event_id": 6, "data": {"type": "removed", "block_hashes": [0x0101010101010101]}}


def test_without_reuse_nothing_is_stored() -> None:
    events = CacheEvents(10, pages=8)
    scheduler = make_scheduler(events, reuse=False)
    run(scheduler, make_request(range(9)))
    assert [event["data"]["type"] for event in events.drain()] == ["created"]


def test_statistics_of_a_step_with_prompts_and_decoding_rows() -> None:
    scheduler = make_scheduler(batch=2)
    scheduler.submit(make_request([1], max_tokens=5))
    first = scheduler.schedule()
    assert first is not None
    commit(scheduler, first)
    scheduler.submit(make_request(range(9), max_tokens=2))
    scheduler.submit(make_request([1, 2, 3]))
    plan = scheduler.schedule()
    assert plan is not None
    stats = iteration_stats(7, 0.25, plan, scheduler)
    assert json.loads(json.dumps(stats)) == stats
    assert (stats["iter"], stats["iterLatencyMS"]) == (7, 250)
    assert [stats[f"num{kind}Requests"] for kind in ("Active", "Queued", "Completed")] == [2, 1, 0]
    assert stats["maxNumActiveRequests"] == 2
    assert stats["inflightBatchingStats"] == {
        "numScheduledRequests": 2,
        "numContextRequests": 1,
        "numGenRequests": 1,
        "numPausedRequests": 0,
        "numCtxTokens": 9,
    }
    assert stats["kvCacheStats"] == {
        "maxNumBlocks": 8,
        "freeNumBlocks": 4,
        "usedNumBlocks": 4,
        "tokensPerBlock": 4,
        "allocTotalBlocks": 4,
        "allocNewBlocks": 4,
        "reusedBlocks": 0,
        "missedBlocks": 4,
        "cacheHitRate": 0.0,
    }


def test_statistics_count_sequences_though_some_have_several_rows_and_others_known_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.submit(edited := replace(make_request([1], max_tokens=5), edits=LogitEdits()))
    first = scheduler.schedule()
    assert first is not None
    commit(scheduler, first)
    scheduler.submit(replace(make_request(range(3)), reports=frozenset({"context_logits"})))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.requests[0], len(plan.requests)) == (edited, 4)
    inflight = iteration_stats(1, 0.0, plan, scheduler)["inflightBatchingStats"]
    kinds = ("ScheduledRequests", "ContextRequests", "GenRequests", "CtxTokens")
    assert [inflight[f"num{kind}"] for kind in kinds] == [2, 1, 1, 3]


def test_statistics_of_a_decode_loop_count_no_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.submit(make_request([1], max_tokens=5))
    assert scheduler.schedule()
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.kind == "decode"
    inflight = iteration_stats(1, 0.0, plan, scheduler)["inflightBatchingStats"]
    assert [inflight[f"num{kind}"] for kind in ("ContextRequests", "GenRequests", "CtxTokens")] == [0, 1, 0]


def test_the_hit_rate_counts_pages_of_prompts() -> None:
    scheduler = make_scheduler()
    run(scheduler, make_request(range(9)), make_request([*range(8), 99, 98]))
    counts = scheduler.cache.stats
    assert (counts.reused, counts.missed) == (2, 4)
    scheduler.submit(make_request([77]))
    plan = scheduler.schedule()
    assert plan is not None
    cache = iteration_stats(1, 0.0, plan, scheduler)["kvCacheStats"]
    assert cache["cacheHitRate"] == pytest.approx(2 / 7)
    assert (cache["reusedBlocks"], cache["missedBlocks"]) == (2, 5)
