"""Drawing for sequences whose logits the host must see: users' functions, penalties, bans, then the device's draw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trtllm_jax.common.errors import RequestError, detached
from trtllm_jax.engine.logit_edits import INVALID, NOTHING_LEFT, top_logprobs
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import Logits, Request, TokenLogprobs

Draw = Callable[[Logits, Sequence[Request]], list[int]]
"""One token for each row of logits [n, vocab], by the sampling parameters of its sequence."""


@dataclass
class HostDraws:
    """What the host drew in one step: by row of the plan, the token, its log-probabilities, or the failure."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    failures: dict[int, Exception] = field(default_factory=dict)


def draw_on_host(
    plan: StepPlan, logits: Mapping[int, Logits], draw: Draw, batched: Callable[..., object] | None
) -> HostDraws:
    """A token for each row of `plan.drawn_on_host`, from these rows' logits [vocab], which stay as they are.

    A user's function that raises fails its own sequences only.
    """
    drawn = HostDraws()
    rows = [row for row in plan.drawn_on_host if plan.requests[row].finished is None]
    changed = {row: logits[row].copy() for row in rows}
    if batched is not None:
        _call_batched(batched, plan, changed, drawn)
    for row in rows:
        request = plan.requests[row]
        if request.edits is None or row in drawn.failures:
            continue
        try:
            for processor in request.edits.processors:
                processor(request.id, changed[row][None, None], _tokens(request), None, None)
            request.edits.apply(changed[row], request.prompt, request.generated)
            if request.matcher is not None:
                request.matcher.restrict(changed[row], logits[row])
            _check(changed[row])
        except BaseException as failure:
            drawn.failures[row] = detached(failure)
    alive = [row for row in rows if row not in drawn.failures]
    if not alive:
        return drawn
    tokens = draw(np.stack([changed[row] for row in alive]), [plan.requests[row] for row in alive])
    drawn.tokens = dict(zip(alive, tokens, strict=True))
    for row, token in drawn.tokens.items():
        count = plan.requests[row].num_logprobs
        if count is not None:
            top, own, rank = top_logprobs(logits[row], count, token)
            drawn.logprobs[row] = TokenLogprobs(token, own, rank, tuple(top))
    return drawn


def _call_batched(batched: Callable[..., object], plan: StepPlan, changed: dict[int, Logits], drawn: HostDraws) -> None:
    asking = [row for row in changed if (edits := plan.requests[row].edits) is not None and edits.batched]
    if not asking:
        return
    requests = [plan.requests[row] for row in asking]
    try:
        batched(
            [request.id for request in requests],
            [changed[row][None, None] for row in asking],
            [_tokens(request) for request in requests],
            None,
            [None] * len(requests),
        )
    except BaseException as failure:
        drawn.failures |= dict.fromkeys(asking, detached(failure))


def _tokens(request: Request) -> list[list[int]]:
    return [request.tokens(0, request.total)]


def _check(logits: Logits) -> None:
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise RequestError(INVALID)
    if not np.isfinite(logits).any():
        raise RequestError(NOTHING_LEFT)
