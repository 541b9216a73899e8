"""Which tokens the constrained rows of a step may draw, as bits that the device applies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.guides import Guide, allowed_words, mask_words


@dataclass(frozen=True, eq=False)
class Masks:
    """For the rows of `StepPlan.masked`, in order: int32 words [n, w], and by row of the plan what went wrong."""

    words: npt.NDArray[np.int32]
    failures: Mapping[int, Exception] = field(default_factory=dict)


def masks_of(plan: StepPlan, vocab: int) -> Masks | None:
    """The masks of a plan whose sequences' newest tokens are known; None where no row has one."""
    if not plan.masked:
        return None
    guides = [guide for row in plan.masked if (guide := plan.requests[row].guide) is not None]
    try:
        words, failures = allowed_words(guides, vocab)
    except Exception:
        words, failures = _one_by_one(guides, vocab)
    return Masks(words, {plan.masked[index]: failure for index, failure in failures.items()})


def _one_by_one(guides: Sequence[Guide], vocab: int) -> tuple[npt.NDArray[np.int32], dict[int, Exception]]:
    """As `allowed_words`, where one guide breaks what is done for all: it fails its own sequence only."""
    words = np.full((len(guides), mask_words(vocab)), -1, np.int32)
    failures: dict[int, Exception] = {}
    for index, guide in enumerate(guides):
        try:
            words[index : index + 1], found = allowed_words([guide], vocab)
        except Exception as failure:
            found = {0: failure}
        if found:
            failures[index] = found[0]
    return words, failures


def follow(plan: StepPlan, tokens: Sequence[Sequence[int]], failures: Mapping[int, Exception]) -> dict[int, Exception]:
    """Tell the guides of a plan what their rows drew; by row, the failures so far and those that this finds."""
    found = dict(failures)
    for row in (*plan.masked, *plan.drawn_on_host):
        request = plan.requests[row]
        if request.guide is None or request.finished is not None or row in found:
            continue
        try:
            request.guide.accept(tokens[row][0])
        except Exception as failure:
            found[row] = failure
    return found
