"""The scheduler's record of one step: whose rows it has, and what each of them computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Literal

import numpy as np

from trtllm_jax.engine.cache_manager import Copy
from trtllm_jax.engine.request import Request
from trtllm_jax.engine.row_outputs import Due

_HAS_EXTRAS = attrgetter("has_extras")


_NOTHING = np.zeros(0, np.int32)


def _nothing() -> np.ndarray:
    return _NOTHING


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One step: a ragged step of prefill chunks and decoding rows, a decode loop, or whole sequences.

    Axes: r rows, t tokens of a ragged step, p pages of a row, n pages that a dispatch may add to a row.

    Attributes:
        kind: "ragged", "decode" for a loop whose rows all decode, or "encode" for whole sequences without a cache,
            which have tokens, starts, first and emits as a ragged step has.
        requests: whose rows these are; read for their sampling parameters, never changed through the plan.
        slots: int32 [r], each sequence's row of the device's state.
        page_tables: for each cache group int32 [r, p], every page of every row. Empty for "decode".
        newest_pages: for each cache group int32 [r, n, 2], the last pages of each row: their columns in the page
            table, and the pages. The device has the earlier ones: a dispatch adds at most n to a row. Empty for
            "ragged".
        tokens: int32 [t], known ids to compute; -1 where the device holds the id (a decoding row). Empty for "decode".
        starts: int32 [r + 1], where each row's tokens begin. Empty for "decode".
        first: int32 [r], position of a row's first token; -1 where the device knows it. Empty for "decode".
        emits: bool [r], whether a token is drawn after the row's last one. Empty for "decode".
        context: bool [r], whether the logits after the row's last token are the prompt's to report. Empty for "decode".
        steps: iterations of the decode loop; 1 for a ragged step.
        gains: for each row the fewest and the most tokens that it may gain, where these differ; else empty.
        copies: for each cache group the pages to copy before anything else, as (source, destination).
        penalised: admitted with this plan; the device is to know their tokens and penalties first.
    """

    kind: Literal["ragged", "decode", "encode"]
    requests: tuple[Request, ...]
    slots: np.ndarray
    page_tables: tuple[np.ndarray, ...] = ()
    newest_pages: tuple[np.ndarray, ...] = ()
    tokens: np.ndarray = field(default_factory=_nothing)
    starts: np.ndarray = field(default_factory=_nothing)
    first: np.ndarray = field(default_factory=_nothing)
    emits: np.ndarray = field(default_factory=_nothing)
    context: np.ndarray = field(default_factory=_nothing)
    steps: int = 1
    gains: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[Copy, ...], ...] = ()
    penalised: tuple[Request, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether every row takes the likeliest token."""
        return all(request.sampling.greedy for request in self.requests)

    @cached_property
    def extras(self) -> list[int]:
        """The rows whose draw has extras: logits changed before it, or log-probabilities after it."""
        # Asked for every step: most have none.
        if not any(map(_HAS_EXTRAS, self.requests)):
            return []
        return [row for row in self._drawing if self.requests[row].has_extras]

    @cached_property
    def not_likeliest(self) -> list[int]:
        """The rows that do more than take the likeliest token: those with extras, and those that sample."""
        return [row for row in self._drawing if self.requests[row].has_extras or not self.requests[row].sampling.greedy]

    @cached_property
    def scored(self) -> bool:
        """Whether any row with extras reports log-probabilities."""
        return any(self.requests[row].num_logprobs is not None for row in self.extras)

    @cached_property
    def edited(self) -> list[int]:
        """The rows that the device draws for after it has changed their logits as the host says."""
        return [row for row in self._needing_host_token if not self.requests[row].host_drawn]

    @cached_property
    def drawn_on_host(self) -> list[int]:
        """The rows whose token the host draws."""
        return [row for row in self._needing_host_token if self.requests[row].host_drawn]

    def rows_with(self, source: str) -> list[int]:
        """The rows of a ragged step for which a program makes a source of `ROW_OUTPUTS`."""
        due = {row for row in self._reporting if self._due(row, self.requests[row], source)}
        return sorted(due.union(self.drawn_on_host) if source == "logits" else due)

    def is_due(self, row: int, due: Due) -> bool:
        """Whether what is reported after such tokens is reported after this row."""
        if due is Due.PROMPT_TOKEN:
            return self.kind == "ragged" and bool(self.context[row])
        return self.kind == "decode" or bool(self.emits[row])

    @cached_property
    def _reporting(self) -> list[int]:
        """The rows of sequences that report more than tokens; computed once a step, because most steps have none."""
        return [row for row, request in enumerate(self.requests) if request.row_outputs]

    def _due(self, row: int, request: Request, source: str) -> bool:
        return any(output.source == source and self.is_due(row, output.due) for output in request.row_outputs)

    @cached_property
    def _needing_host_token(self) -> list[int]:
        return [row for row in self._emitting if self.requests[row].needs_host_token]

    @cached_property
    def _emitting(self) -> list[int]:
        """The rows of a ragged step that a token is drawn for."""
        return np.flatnonzero(self.emits).tolist()

    @property
    def _drawing(self) -> Sequence[int]:
        """The rows that a token is drawn for."""
        return range(len(self.requests)) if self.kind == "decode" else self._emitting
