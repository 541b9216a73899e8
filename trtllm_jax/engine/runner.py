"""The device's side of the engine: owns weights, caches and row state, and turns plans into dispatched programs."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trtllm_jax.common.errors import RequestError
from trtllm_jax.engine import weights
from trtllm_jax.engine.block_pool import PADDING_PAGE
from trtllm_jax.engine.edit_list import edit_arrays
from trtllm_jax.engine.extras import Outcome, Scores
from trtllm_jax.engine.logit_edits import INVALID, NOTHING_LEFT
from trtllm_jax.engine.packing import Layout
from trtllm_jax.engine.penalties import Penalties, pack_begin
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.programs import COPIES_PER_CALL, Programs
from trtllm_jax.engine.request import Embedding, Logits, Request, TokenLogprobs
from trtllm_jax.engine.row_state import RowState, sampling_arrays
from trtllm_jax.engine.step_edits import StepEdits
from trtllm_jax.engine.steps import draw_layout, extras_layout


class StepOutput(NamedTuple):
    """What a step brought, on the host, by rows of its plan.

    Attributes:
        tokens: what each row gained.
        logprobs: of each gained token of the rows that ask for them and that the device drew for.
        logits: [vocab], of `StepPlan.with_logits`.
        embeddings: [embed], of `StepPlan.with_embeddings`.
        failures: of rows whose changed logits cannot be drawn from, or whose constraint cannot be followed.
    """

    tokens: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]]
    logits: dict[int, Logits]
    embeddings: dict[int, Embedding]
    failures: dict[int, Exception]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was drawn for rows that were changed on the device, in their order: outcomes and tokens [n, 2]."""

    changes: StepEdits
    out: jax.Array
    logprobs: tuple[jax.Array, ...] = ()


@dataclass(frozen=True, eq=False)
class InFlight:
    """A dispatched plan, the last rows [s - 1, embed] of its step, and the arrays that will hold what it brought.

    `dispatched` is when, in `time.perf_counter`'s seconds.
    """

    plan: StepPlan
    out: jax.Array
    extras: Sequence[int] = ()
    scores: jax.Array | None = None
    logits: jax.Array | None = None
    embeddings: jax.Array | None = None
    last: jax.Array | None = None
    drawn: tuple[Drawn, ...] = ()
    dispatched: float = field(default_factory=time.perf_counter)

    @property
    def arrays(self) -> list[jax.Array]:
        """What the host reads of it."""
        step = (self.out, self.scores, self.logits, self.embeddings)
        drawn = [array for one in self.drawn for array in (one.out, *one.logprobs)]
        return [array for array in (*step, *drawn) if array is not None]

    def output(self) -> StepOutput:
        """What came of it; waits for the device."""
        plan = self.plan
        tokens = [row[1 : 1 + row[0]] for row in np.asarray(self.out)[: len(plan.requests)].tolist()]
        failures: dict[int, Exception] = {}
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if self.scores is not None:
            scores = Scores.unpacked(np.asarray(self.scores))
            _take_extras(self.extras, scores, tokens, failures)
            if plan.scored:
                logprobs = _token_logprobs(plan, self.extras, tokens, scores[2:])
        for drawn in self.drawn:
            failures |= drawn.changes.failures
            for row, (outcome, token) in zip(drawn.changes.rows, np.asarray(drawn.out).tolist(), strict=False):
                tokens[row] = [token]
                if outcome != Outcome.DRAWN:
                    failures.setdefault(row, _failure(outcome))
            # One token each: as the scores of a step.
            known = [np.asarray(array)[None] for array in drawn.logprobs]
            logprobs |= _token_logprobs(plan, drawn.changes.rows, tokens, known)
        logits = _by_row(plan.with_logits, self.logits)
        return StepOutput(tokens, logprobs, logits, _by_row(plan.with_embeddings, self.embeddings), failures)


def _take_extras(rows: Sequence[int], scores: Scores, tokens: list[list[int]], failures: dict[int, Exception]) -> None:
    """Put the tokens that extras drew in the place of others, and the failures of draws beside those known."""
    drawn, outcomes = scores.token.T.tolist(), scores.outcome.T.tolist()
    for place, row in enumerate(rows):
        gained = len(tokens[row])
        tokens[row] = drawn[place][:gained]
        failed = [outcome for outcome in outcomes[place][:gained] if outcome != Outcome.DRAWN]
        if failed:
            failures[row] = _failure(failed[0])


def _failure(outcome: int) -> RequestError:
    return RequestError(INVALID if outcome == Outcome.INVALID else NOTHING_LEFT)


def _by_row(rows: Sequence[int], values: jax.Array | None) -> dict[int, Any]:
    return {} if values is None else dict(zip(rows, np.asarray(values), strict=False))


def _token_logprobs(
    plan: StepPlan, rows: Sequence[int], tokens: Sequence[Sequence[int]], arrays: Sequence[jax.Array | np.ndarray]
) -> dict[int, list[TokenLogprobs]]:
    """Of what `rows` gained, as far as they asked. `arrays` [tokens, rows, ...]: the last four of `Scores`, or none."""
    if not arrays:
        return {}
    most = max((plan.requests[row].num_logprobs or 0 for row in rows), default=0)
    own, rank, ids, values = (np.asarray(array).swapaxes(0, 1) for array in arrays)
    all_own, all_rank, all_ids, all_values = (
        own.tolist(),
        rank.tolist(),
        ids[..., :most].tolist(),
        values[..., :most].tolist(),
    )
    found = {}
    for place, row in enumerate(rows):
        count = plan.requests[row].num_logprobs
        if count is not None:
            found[row] = [
                TokenLogprobs(token, own, rank, tuple(zip(ids[:count], values[:count], strict=True)))
                for token, own, rank, ids, values in zip(
                    tokens[row], all_own[place], all_rank[place], all_ids[place], all_values[place], strict=False
                )
            ]
    return found


class Runner:
    """Runs plans on the devices, in order, without waiting for them.

    Args:
        programs: compiled already.
        params: the weights, on the devices; others like them may take their place between two plans.
        caches: every layer's cache, on the devices; donated from step to step.
        mesh: the devices.
    """

    def __init__(self, programs: Programs, params: Any, caches: tuple[jax.Array, ...], mesh: Mesh) -> None:
        self._programs = programs
        self.params = params
        self._caches = caches
        self._padding_slot = programs.limits.max_batch_size
        self._replicated = NamedSharding(mesh, P())
        self._everything: dict[int, jax.Array] = {}
        self._unread: list[InFlight] = []
        """Dispatched, and on their way to the host."""
        make = jax.jit(RowState.empty, static_argnums=(0, 1), out_shardings=self._replicated)
        self._state: RowState = make(self._padding_slot, programs.table_width)
        make = jax.jit(Penalties.empty, static_argnums=(0, 1, 2), out_shardings=self._replicated)
        self._penalties: Penalties = make(self._padding_slot, programs.vocab, programs.limits.max_seq_len)

    @property
    def vocab(self) -> int:
        """Ids of the model are 0 to vocab - 1."""
        return self._programs.vocab

    def compile_rest(self) -> None:
        """Return when every program is compiled."""
        self._programs.compile_rest()

    @property
    def edits_at_once(self) -> int:
        """Entries that one `StepEdits` may hold."""
        return self._programs.edits_at_once

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Start a plan; what it brings is on its way to the host when it is done."""
        if plan.copies:
            self._copy(plan.copies)
        for request in plan.penalised:
            layout, begin = self._programs.begin()
            self._penalties = begin(self._penalties, pack_begin(layout, request))
        return self._send(self._ragged(plan) if plan.kind == "step" else self._decode(plan))

    def draw_edited(self, flight: InFlight, changes: Sequence[StepEdits]) -> InFlight:
        """The same flight with tokens for its edited rows, in place of those that the step draws."""
        return self._send(replace(flight, drawn=tuple(self._draw_edited(flight, some) for some in changes)))

    def read(self, flight: InFlight) -> StepOutput:
        """What came of a dispatched plan; waits for the device."""
        output = flight.output()
        self._unread = [other for other in self._unread if other.plan is not flight.plan]
        return output

    def fitted(self, params: Any, *, copy: bool) -> Any:
        """Other weights in the place of the first, as `weights.fitted` says."""
        return weights.fitted(params, self._programs.params, copy=copy)

    def with_cause(self, failure: BaseException) -> BaseException:
        """The failure of a step, or if weights that it read are gone, an error that says so and what to do."""
        gone = weights.deleted(self.params)
        if not gone:
            return failure
        error = RuntimeError(
            f"{len(gone)} of the engine's weights were deleted, {gone[0]!r} first: a program took them by donation; "
            "give the engine its own with llm.update_weights(params, copy=True), or do not donate while requests run"
        )
        error.__cause__ = failure
        return error

    def close(self) -> None:
        """Wait for what is on its way, which calls back into Python, and free what is on the devices."""
        for array in [array for flight in self._unread for array in flight.arrays]:
            with contextlib.suppress(Exception):  # the failure of a step was told already
                np.asarray(array)
        self._unread.clear()
        self._programs.close()
        for array in jax.tree.leaves((self._caches, self._state, self._penalties, self._everything)):
            array.delete()
        self.params = None

    def _ragged(self, plan: StepPlan) -> InFlight:
        tokens = self._programs.token_bucket(len(plan.tokens))
        rows = self._programs.rows_of(tokens)
        packed = pack_ragged(plan, self._programs.ragged_layout(tokens), rows, self._padding_slot)
        self._caches, self._state, out, last = self._programs.ragged(tokens)(
            self.params, self._caches, self._state, packed
        )
        scores = None
        if plan.extras:
            packed = pack_extras(plan, extras_layout(rows), rows, self._padding_slot)
            self._state, self._penalties, scores = self._programs.extras(rows, len(plan.extras))(
                self.params, self._state, self._penalties, last, out, packed
            )
        logits = self._of_rows(self._programs.logits, plan.with_logits, last)
        embeddings = self._of_rows(self._programs.embeddings, plan.with_embeddings, last)
        return InFlight(plan, out, plan.extras, scores, logits, embeddings, last)

    def _of_rows(
        self, program_of: Callable[[int], Callable[..., Any]], rows: Sequence[int], last: jax.Array
    ) -> jax.Array | None:
        """What a program makes of some rows of a step; None for none."""
        if not rows:
            return None
        size = self._programs.size_for(len(rows))
        found: jax.Array = program_of(size)(self.params, last, _padded_rows(rows, size))
        return found

    def _draw_edited(self, flight: InFlight, changes: StepEdits) -> Drawn:
        requests = [flight.plan.requests[row] for row in changes.rows]
        entries = sum(one.ids.size for one in changes.edits)
        size = self._programs.edited_size(len(requests), entries)
        layout, program = self._programs.edited(size)
        rows = _padded_rows(changes.rows, size)
        packed = layout.pack(
            row=rows,
            guided=np.array([request.matcher is not None for request in requests]),
            position=np.array([request.total for request in requests], np.int32),
            **edit_arrays(requests, changes.edits),
            **sampling_arrays(requests),
        )
        drawn = program(self.params, flight.last, self._allowed(size, changes), packed)
        logprobs = ()
        if any(request.num_logprobs is not None for request in requests):
            logprobs = self._programs.logprobs(size)(self.params, flight.last, rows, drawn)
        return Drawn(changes, drawn, logprobs)

    def _allowed(self, size: int, changes: StepEdits) -> np.ndarray | jax.Array:
        """The words of as many rows as the program takes. Where no row has a constraint the device has them already."""
        if changes.allowed is not None:
            padded = np.zeros((size, self._programs.mask_words), np.int32)
            padded[: len(changes.allowed)] = changes.allowed
            return padded
        if size not in self._everything:
            words = np.full((size, self._programs.mask_words), -1, np.int32)
            self._everything[size] = jax.device_put(words, self._replicated)
        return self._everything[size]

    def draw(self, logits: Logits, requests: Sequence[Request]) -> list[int]:
        """A token for each row of logits [n, vocab], by its sequence's sampling parameters; waits for the device."""
        size = self._programs.size_for(len(requests))
        layout = draw_layout(size)
        position = np.array([request.total for request in requests], np.int32)
        padded = np.zeros((size, logits.shape[1]), np.float32)
        padded[: len(logits)] = logits
        packed = layout.pack(position=position, **sampling_arrays(requests))
        return np.asarray(self._programs.draw(size)(padded, packed))[: len(requests)].tolist()

    def _decode(self, plan: StepPlan) -> InFlight:
        extras = plan.not_likeliest if self._programs.draws_few_alone else plan.extras
        rows = self._programs.row_bucket(len(plan.slots), plan.greedy, len(extras))
        layout, program, knows_extras = self._programs.decode(rows, plan.greedy, len(extras))
        packed = pack_decode(plan, extras if knows_extras else None, layout, rows, self._padding_slot)
        self._caches, self._state, penalties, out, scores = program(
            self.params, self._caches, self._state, self._penalties if knows_extras else None, packed
        )
        if knows_extras:
            self._penalties = penalties
        return InFlight(plan, out, extras, scores=scores if extras else None)

    def _send(self, flight: InFlight) -> InFlight:
        """Have what it brings copied to the host once it is there."""
        self._unread.append(flight)
        for array in flight.arrays:
            array.copy_to_host_async()
        return flight

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for first in range(0, len(copies), COPIES_PER_CALL):
            pairs = np.full((COPIES_PER_CALL, 2), PADDING_PAGE, np.int32)
            some = copies[first : first + COPIES_PER_CALL]
            pairs[: len(some)] = some
            self._caches = self._programs.copy()(self._caches, pairs)


def pack_ragged(plan: StepPlan, layout: Layout, rows: int, padding_slot: int) -> np.ndarray:
    """What a ragged step of `rows` rows is sent: the plan, rows beyond it empty and of the padding slot."""
    starts = np.full(rows + 1, plan.starts[-1], np.int32)
    starts[: len(plan.starts)] = plan.starts
    slots = _padded_slots(_own_slots(plan, padding_slot), rows, padding_slot)
    return layout.pack(
        tokens=plan.tokens,
        starts=starts,
        first=plan.first,
        emits=plan.emits,
        slots=slots,
        prompt=np.array([len(request.prompt) for request in plan.requests], np.int32),
        page_table=plan.page_table,
        **sampling_arrays(plan.requests),
    )


def pack_decode(
    plan: StepPlan, extras: Sequence[int] | None, layout: Layout, rows: int, padding_slot: int
) -> np.ndarray:
    """What a decode loop of `rows` rows is sent: the plan, rows beyond it of the padding slot.

    `extras` are None for a program that has no room for them.
    """
    return layout.pack(
        steps=np.array(plan.steps, np.int32),
        slots=_padded_slots(plan.slots, rows, padding_slot),
        newest_pages=plan.newest_pages,
        **({} if extras is None else _extra_arrays(plan, extras)),
    )


def pack_extras(plan: StepPlan, layout: Layout, rows: int, padding_slot: int) -> np.ndarray:
    """What the extras of a ragged step of `rows` rows are sent."""
    return layout.pack(
        slots=_padded_slots(_own_slots(plan, padding_slot), rows, padding_slot), **_extra_arrays(plan, plan.extras)
    )


def _extra_arrays(plan: StepPlan, extras: Sequence[int]) -> dict[str, np.ndarray]:
    return {
        "num_extras": np.array(len(extras)),
        "extras": np.array(extras, np.int32),
        "penalised": np.array([plan.requests[row].penalised for row in extras], np.bool_),
        "scored": np.array(plan.scored),
    }


def _own_slots(plan: StepPlan, padding_slot: int) -> np.ndarray:
    """The slots of a ragged step's rows. Of a sequence's rows the last alone has it: of several any could win."""
    slots = plan.slots.copy()
    slots[:-1][slots[:-1] == slots[1:]] = padding_slot
    return slots


def _padded_rows(rows: Sequence[int], size: int) -> np.ndarray:
    """As many rows as a program takes, the first one in place of those that are missing."""
    padded = np.full(size, rows[0], np.int32)
    padded[: len(rows)] = rows
    return padded


def _padded_slots(slots: np.ndarray, rows: int, padding_slot: int) -> np.ndarray:
    padded = np.full(rows, padding_slot, np.int32)
    padded[: len(slots)] = slots
    return padded
