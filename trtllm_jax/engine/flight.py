"""A dispatched step, and its results once the device is done."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trtllm_jax.common.errors import RequestError
from trtllm_jax.engine.extras import Outcome, Scores
from trtllm_jax.engine.logit_edits import INVALID, NOTHING_LEFT
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import TokenLogprobs
from trtllm_jax.engine.row_outputs import AFTER_STEP
from trtllm_jax.engine.runner import Results
from trtllm_jax.engine.step_edits import StepEdits
from trtllm_jax.engine.step_output import StepOutput

NOT_FINITE = (
    "the model's logits hold NaN or +inf, so its tokens have no log-probabilities; check the weights, or load them "
    "with dtype='float32' if they exceed what float16 holds"
)
"""What is wrong where a log-probability is no number."""

Read = Callable[[Results], Mapping[str, np.ndarray]]


class EditedDraw(NamedTuple):
    """Rows that were drawn for after their logits were edited, and what was reported of them."""

    edits: StepEdits
    results: Results


@dataclass(frozen=True, eq=False)
class InFlight:
    """A dispatched plan.

    Attributes:
        plan: what was dispatched.
        results: what its programs report.
        extras: the rows that its scores are of.
        draws: what was drawn for rows with edited logits, in the place of the step's own draws.
        dispatched: when, in `time.perf_counter`'s seconds.
    """

    plan: StepPlan
    results: Results
    extras: Sequence[int] = ()
    draws: tuple[EditedDraw, ...] = ()
    dispatched: float = field(default_factory=time.perf_counter)

    def output(self, read: Read) -> StepOutput:
        """What came of it; `read` gives the host's arrays, and waits for the device."""
        plan, found = self.plan, read(self.results)
        rows = found["tokens"][: len(plan.requests)].tolist() if "tokens" in found else [[0]] * len(plan.requests)
        output = StepOutput([row[1 : 1 + row[0]] for row in rows])
        for source in AFTER_STEP:
            if source in found:
                output.by_row[source] = dict(zip(plan.rows_with(source), found[source], strict=False))
        if "scores" in found and self.extras:
            _take_scores(output, plan, self.extras, Scores.unpacked(found["scores"]), plan.scored)
        for draw in self.draws:
            _take_draw(output, plan, draw.edits, read(draw.results))
        return output


def _take_scores(output: StepOutput, plan: StepPlan, rows: Sequence[int], scores: Scores, scored: bool) -> None:
    """Put the tokens that extras drew in the place of others, with failures and log-probabilities."""
    drawn, outcomes = scores.token.T.tolist(), scores.outcome.T.tolist()
    for place, row in enumerate(rows):
        gained = len(output.tokens[row])
        output.tokens[row] = drawn[place][:gained]
        failed = [outcome for outcome in outcomes[place][:gained] if outcome != Outcome.DRAWN]
        if failed:
            output.failures[row] = _failure(failed[0])
    if scored:
        _add_logprobs(output, plan, rows, scores)


def _take_draw(output: StepOutput, plan: StepPlan, edits: StepEdits, found: Mapping[str, np.ndarray]) -> None:
    """Put what was drawn from edited logits in the place of the step's own tokens."""
    output.failures.update(edits.failures)
    for row, (outcome, token) in zip(edits.rows, found["drawn"].tolist(), strict=False):
        output.tokens[row] = [token]
        if outcome != Outcome.DRAWN:
            output.failures.setdefault(row, _failure(outcome))
    if "scores" in found:
        _add_logprobs(output, plan, edits.rows, Scores.unpacked(found["scores"]))


def _failure(outcome: int) -> RequestError:
    return RequestError(INVALID if outcome == Outcome.INVALID else NOTHING_LEFT)


def _add_logprobs(output: StepOutput, plan: StepPlan, rows: Sequence[int], scores: Scores) -> None:
    """Add the log-probabilities of what `rows` gained; one that is no number fails its row, and no other."""
    found = _token_logprobs(plan, rows, output.tokens, scores)
    output.by_row["logprobs"].update(found)
    for row, tokens in found.items():
        if any(math.isnan(token.logprob) for token in tokens):
            output.failures.setdefault(row, RequestError(NOT_FINITE))


def _token_logprobs(
    plan: StepPlan, rows: Sequence[int], tokens: Sequence[Sequence[int]], scores: Scores
) -> dict[int, list[TokenLogprobs]]:
    """Of what `rows` gained, as far as they asked. The scores have the axes [tokens, rows, ...]."""
    most = max((plan.requests[row].num_logprobs or 0 for row in rows), default=0)
    own, rank = scores.own.T.tolist(), scores.rank.T.tolist()
    ids = scores.ids.swapaxes(0, 1)[..., :most].tolist()
    best = scores.best.swapaxes(0, 1)[..., :most].tolist()
    found = {}
    for place, row in enumerate(rows):
        count = plan.requests[row].num_logprobs
        if count is not None:
            found[row] = [
                TokenLogprobs(token, own, rank, tuple(zip(ids[:count], best[:count], strict=True)))
                for token, own, rank, ids, best in zip(
                    tokens[row], own[place], rank[place], ids[place], best[place], strict=False
                )
            ]
    return found
