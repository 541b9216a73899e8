"""The engine's reports in TensorRT-LLM's form: prefix-cache events, and statistics of each step."""

import resource
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from trtllm_jax.engine.encode_scheduler import EncodeScheduler
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.scheduler import Scheduler

Record = dict[str, Any]

DEFAULT_PRIORITY = 35
"""TensorRT-LLM's retention priority of an ordinary block."""


class CacheEvents:
    """The newest `length` events of the prefix cache: created once, then stored and removed blocks."""

    def __init__(self, length: int, pages: int) -> None:
        self._events: deque[Record] = deque(maxlen=length)
        self._next_id = 0
        self._add({"type": "created", "num_blocks_per_cache_level": [pages, 0]})

    def stored(self, parent: bytes, block: bytes, tokens: Sequence[int]) -> None:
        """A full block became findable."""
        self._add(
            {
                "type": "stored",
                "parent_hash": _readable(parent),
                "blocks": [
                    {
                        "type": "stored_block",
                        "block_hash": _readable(block),
                        "tokens": [
                            {"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens
                        ],
                        "cache_level": 0,
                        "priority": DEFAULT_PRIORITY,
                    }
                ],
            }
        )

    def removed(self, block: bytes) -> None:
        """A block was taken for something else."""
        self._add({"type": "removed", "block_hashes": [_readable(block)]})

    def drain(self) -> list[Record]:
        """The events since the last call, oldest first."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def _add(self, data: Record) -> None:
        self._events.append({"event_id": self._next_id, "data": data})
        self._next_id += 1


def _readable(block: bytes) -> int | None:
    """A block's chain hash as a 64-bit number; None for the empty chain."""
    return int.from_bytes(block[:8], "big") if block else None


def iteration_stats(iteration: int, seconds: float, plan: StepPlan, scheduler: Scheduler | EncodeScheduler) -> Record:
    """One step's statistics with TensorRT-LLM's field names."""
    cache, counters = scheduler.cache_stats, scheduler.counters
    looked_up = cache.reused + cache.missed
    # A sequence may have several rows, and one that the host draws for has a known token in each step.
    prompt_rows = [row for row, first in enumerate(plan.first.tolist()) if 0 <= first < plan.requests[row].prefill_end]
    scheduled, prompts = set(plan.requests), {plan.requests[row] for row in prompt_rows}
    return {
        "iter": iteration,
        "timestamp": time.strftime("%m-%d-%Y %H:%M:%S"),
        "iterLatencyMS": seconds * 1e3,
        "numActiveRequests": len(scheduler.running),
        "numQueuedRequests": len(scheduler.waiting),
        "numCompletedRequests": counters.completed,
        "maxNumActiveRequests": scheduler.limits.max_batch_size,
        "cpuMemUsage": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "kvCacheStats": {
            "maxNumBlocks": cache.capacity,
            "freeNumBlocks": cache.available,
            "usedNumBlocks": cache.used,
            "tokensPerBlock": cache.page_size,
            "allocTotalBlocks": cache.allocated + cache.reused,
            "allocNewBlocks": cache.allocated,
            "reusedBlocks": cache.reused,
            "missedBlocks": cache.missed,
            "cacheHitRate": cache.reused / looked_up if looked_up else 0.0,
        },
        "inflightBatchingStats": {
            "numScheduledRequests": len(scheduled),
            "numContextRequests": len(prompts),
            "numGenRequests": len(scheduled) - len(prompts),
            "numPausedRequests": counters.preempted,
            "numCtxTokens": sum(int(plan.starts[row + 1] - plan.starts[row]) for row in prompt_rows),
        },
    }
