"""What the host sends a ragged step whose sequences have several rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.cache_manager import Group, KVCacheManager
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.packer import Packer, pack_ragged
from trtllm_jax.engine.program_table import COPIES_PER_CALL
from trtllm_jax.engine.scheduler import Scheduler
from trtllm_jax.engine.steps import ragged_layout

from .simulation import make_request

PADDING_SLOT = 6


def test_one_row_of_a_sequence_writes_its_state() -> None:
    """Two that wrote to one slot could leave either of their states there."""
    limits = SchedulerLimits(PADDING_SLOT, 16, 32, 4)
    scheduler = Scheduler(limits, KVCacheManager(limits, [Group(BlockPool(20, 4))]))
    scheduler.submit(make_request(range(3), 4, reports=frozenset({"context_logits"})))
    scheduler.submit(make_request([7, 8], 4, seed=1))
    plan = scheduler.schedule()
    assert plan is not None
    (table,) = plan.page_tables
    layout = ragged_layout(16, PADDING_SLOT, table.shape[1:])
    sent = layout.unpack(jnp.asarray(pack_ragged(plan, layout, PADDING_SLOT, PADDING_SLOT)))
    told, other = plan.requests[0].slot, plan.requests[-1].slot
    assert plan.slots.tolist() == [told, told, told, other]
    assert sent["slots"].tolist() == [PADDING_SLOT, PADDING_SLOT, told, other, PADDING_SLOT, PADDING_SLOT]
    assert sent["emits"].tolist() == [False, False, True, True, False, False]
    assert sent["page_table_0"][0].tolist() == sent["page_table_0"][2].tolist()


def test_more_copies_than_a_call_takes_are_several_calls() -> None:
    programs: Any = SimpleNamespace(sizes=SimpleNamespace(limits=SimpleNamespace(max_batch_size=4)))
    copies = [[(page, page + 100) for page in range(1, count + 1)] for count in (COPIES_PER_CALL + 1, 2)]
    plan: Any = SimpleNamespace(copies=copies)
    dispatches = Packer(programs)._copies(plan)
    assert [dispatch.key for dispatch in dispatches] == [("copy", 0), ("copy", 0), ("copy", 1)]
    for group, expected in enumerate(copies):
        sent = [pair for each in dispatches if each.key[1] == group for pair in each.inputs["pairs"].tolist()]
        assert [tuple(pair) for pair in sent if pair != [0, 0]] == expected
