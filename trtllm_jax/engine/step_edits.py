"""Edits of the logits of some rows of a step, sent to the device before it draws for them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtllm_jax.common.errors import detached
from trtllm_jax.engine.edit_list import EditList, edit_list
from trtllm_jax.engine.grammar import GrammarMatcher, mask_words
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.step_output import StepOutput


@dataclass(frozen=True, eq=False)
class StepEdits:
    """Of rows that one program takes at once.

    Attributes:
        rows: of the plan, n.
        edits: of each of them.
        allowed: int32 words [n, w] in which bit i of word j is id 32 j + i, of rows without a constraint all ones; None
            where no row has one.
        failures: by row of the plan, what went wrong with its constraint.
    """

    rows: Sequence[int]
    edits: Sequence[EditList]
    allowed: npt.NDArray[np.int32] | None
    failures: Mapping[int, Exception]


def step_edits(plan: StepPlan, vocab: int, room: int) -> tuple[StepEdits, ...]:
    """Those of a plan whose changed sequences' newest tokens are known, no more than `room` entries in each."""
    lists = {row: edit_list(plan.requests[row]) for row in plan.edited}
    return tuple(_changes(plan, rows, [lists[row] for row in rows], vocab) for rows in _grouped(lists, room))


def _grouped(lists: Mapping[int, EditList], room: int) -> Iterator[list[int]]:
    group: list[int] = []
    taken = 0
    for row, entries in lists.items():
        if group and taken + entries.ids.size > room:
            yield group
            group, taken = [], 0
        group.append(row)
        taken += entries.ids.size
    if group:
        yield group


def _changes(plan: StepPlan, rows: Sequence[int], edits: Sequence[EditList], vocab: int) -> StepEdits:
    matchers = {index: matcher for index, row in enumerate(rows) if (matcher := plan.requests[row].matcher) is not None}
    if not matchers:
        return StepEdits(rows, edits, None, {})
    try:
        words, failures = _allowed_words(list(matchers.values()), vocab)
    except BaseException:
        words, failures = _one_by_one(list(matchers.values()), vocab)
    allowed = np.full((len(rows), mask_words(vocab)), -1, np.int32)
    allowed[list(matchers)] = words
    guided = [rows[index] for index in matchers]
    return StepEdits(rows, edits, allowed, {guided[index]: failure for index, failure in failures.items()})


def _allowed_words(
    matchers: Sequence[GrammarMatcher], vocab: int
) -> tuple[npt.NDArray[np.int32], dict[int, Exception]]:
    return type(matchers[0]).allowed_words(matchers, vocab)


def _one_by_one(matchers: Sequence[GrammarMatcher], vocab: int) -> tuple[npt.NDArray[np.int32], dict[int, Exception]]:
    """As `allowed_words`, where one matcher breaks what is done for all: it fails its own sequence only."""
    words = np.full((len(matchers), mask_words(vocab)), -1, np.int32)
    failures: dict[int, Exception] = {}
    for index, matcher in enumerate(matchers):
        try:
            words[index : index + 1], found = _allowed_words([matcher], vocab)
        except BaseException as failure:
            found = {0: detached(failure)}
        if found:
            failures[index] = found[0]
    return words, failures


def advance_matchers(plan: StepPlan, output: StepOutput) -> None:
    """Tell the matchers of a plan's rows what was drawn; failures that this finds are added to the others."""
    for row in (*plan.edited, *plan.drawn_on_host):
        request = plan.requests[row]
        if request.matcher is None or request.finished is not None or row in output.failures:
            continue
        try:
            request.matcher.accept(output.tokens[row][0])
        except BaseException as failure:
            output.failures[row] = detached(failure)
