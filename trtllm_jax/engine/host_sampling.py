"""Tokens of sequences whose logits come to the host: it edits them, users' functions included, and has them sampled."""

from collections.abc import Callable, Sequence

import numpy as np

from trtllm_jax.common.errors import RequestError, detached
from trtllm_jax.engine.logit_edits import INVALID, NOTHING_LEFT, top_logprobs
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import Logits, Request, TokenLogprobs
from trtllm_jax.engine.step_output import StepOutput

Draw = Callable[[Logits, Sequence[Request]], list[int]]
"""One token for each row of logits [n, vocab], by the sampling parameters of its sequence."""


def draw_on_host(plan: StepPlan, output: StepOutput, draw: Draw, batched: Callable[..., object] | None) -> None:
    """Add to a step's output a token for each row of `plan.drawn_on_host`, drawn from its logits in `output`.

    These stay as they are. A user's function that raises fails its own sequences only.
    """
    logits = output.by_row["logits"]
    for row in plan.drawn_on_host:
        output.tokens[row] = []
    rows = [row for row in plan.drawn_on_host if plan.requests[row].finished is None]
    changed = {row: logits[row].copy() for row in rows}
    if batched is not None:
        _call_batched(batched, plan, changed, output)
    for row in rows:
        if row not in output.failures:
            try:
                _change(plan.requests[row], changed[row], logits[row])
            except BaseException as failure:
                output.failures[row] = detached(failure)
    alive = [row for row in rows if row not in output.failures]
    if not alive:
        return
    tokens = draw(np.stack([changed[row] for row in alive]), [plan.requests[row] for row in alive])
    for row, token in zip(alive, tokens, strict=True):
        output.tokens[row] = [token]
        count = plan.requests[row].num_logprobs
        if count is not None:
            top, own, rank = top_logprobs(logits[row], count, token)
            output.by_row["logprobs"][row] = [TokenLogprobs(token, own, rank, tuple(top))]


def _change(request: Request, logits: Logits, original: Logits) -> None:
    """Change a sequence's logits [vocab] in place as it asks; raises where nothing can be drawn from them then."""
    if request.edits is None:
        return
    for processor in request.edits.processors:
        processor(request.id, logits[None, None], _tokens(request), None, None)
    request.edits.apply(logits, request.prompt, request.generated)
    if request.matcher is not None:
        request.matcher.restrict(logits, original)
    _check(logits)


def _call_batched(
    batched: Callable[..., object], plan: StepPlan, changed: dict[int, Logits], output: StepOutput
) -> None:
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
        output.failures.update(dict.fromkeys(asking, detached(failure)))


def _tokens(request: Request) -> list[list[int]]:
    return [request.tokens(0, request.total)]


def _check(logits: Logits) -> None:
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise RequestError(INVALID)
    if not np.isfinite(logits).any():
        raise RequestError(NOTHING_LEFT)
