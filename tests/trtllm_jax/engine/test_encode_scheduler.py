"""Steps of whole sequences: nobody waits for ever, no step is too large, every sequence ends once."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trtllm_jax.engine.config import encode_widths
from trtllm_jax.engine.encode_scheduler import EncodeScheduler
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.request import FinishReason, Request, Update
from trtllm_jax.engine.sampling import Sampling
from trtllm_jax.engine.step_output import StepOutput

SAMPLING = Sampling(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0, seed=0, greedy=True)


def sequence(length: int) -> Request:
    return Request(range(length), 0, SAMPLING, reports=frozenset({"embedding"}))


def some_output(rows: int) -> StepOutput:
    output = StepOutput([[]] * rows)
    output.by_row["embeddings"] = dict(enumerate(np.arange(rows, dtype=np.float32)[:, None]))
    return output


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_ends_once_in_a_step_that_has_room(seed: int) -> None:
    draw = random.Random(seed)
    longest = draw.choice([20, 64, 100])
    limits = SchedulerLimits(draw.choice([1, 3, 8]), max(longest, draw.choice([16, 64, 200])), longest, 1)
    widths = encode_widths(longest)
    scheduler = EncodeScheduler(limits, widths)
    pending = [sequence(draw.randint(1, longest)) for _ in range(60)]
    submitted: list[Request] = []
    ended: dict[Request, FinishReason | None] = {}

    def note(update: Update | None) -> None:
        if update is not None:
            assert update.request not in ended
            ended[update.request] = update.finish

    while pending or scheduler.has_work:
        for _ in range(draw.randint(0, 6)):
            if pending:
                submitted.append(pending.pop())
                scheduler.submit(submitted[-1])
        if draw.random() < 0.3 and submitted:
            note(scheduler.finish(draw.choice(submitted), FinishReason.CANCELLED))
        oldest = next(iter(scheduler.waiting), None)
        plan = scheduler.schedule()
        if plan is None:
            assert oldest is None
            continue
        assert oldest in plan.requests
        lengths = np.diff(plan.starts)
        width = min(one for one in widths if one >= lengths.max())
        assert len(lengths) <= limits.max_batch_size
        assert len(lengths) == 1 or len(lengths) * width <= limits.max_num_tokens
        assert [list(request.prompt) for request in plan.requests] == [
            plan.tokens[start:end].tolist() for start, end in zip(plan.starts, plan.starts[1:], strict=False)
        ]
        if draw.random() < 0.2:
            note(scheduler.finish(plan.requests[0], FinishReason.CANCELLED))
        for update in scheduler.commit(plan, some_output(len(plan.requests))):
            assert update.outputs["embedding"][0] == [plan.requests.index(update.request)]
            note(update)
        assert not scheduler.running
    assert ended.keys() == set(submitted)
    assert scheduler.counters.completed == len(submitted)
