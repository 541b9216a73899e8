"""The device's side of the engine: owns weights, caches and row state, and turns plans into dispatched programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trtllm_jax.engine import weights
from trtllm_jax.engine.block_pool import PADDING_PAGE
from trtllm_jax.engine.packing import Layout
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.programs import COPIES_A_CALL, Programs, bucket_for
from trtllm_jax.engine.request import Embedding, Logits, Request, TokenLogprobs
from trtllm_jax.engine.row_state import RowState, wish_arrays
from trtllm_jax.engine.steps import draw_layout


@dataclass(frozen=True, eq=False)
class InFlight:
    """A dispatched plan and the arrays that will hold what it brought."""

    plan: StepPlan
    out: jax.Array
    logprobs: tuple[jax.Array, ...] = ()
    logits: jax.Array | None = None
    embeddings: jax.Array | None = None

    def tokens(self) -> list[list[int]]:
        """What each row gained; waits for the device."""
        out = np.asarray(self.out)[: len(self.plan.requests)]
        return [row[1 : 1 + row[0]] for row in out.tolist()]

    def row_logits(self) -> Sequence[Logits]:
        """The logits [vocab] of each row, () where the plan wants none; waits for the device."""
        return () if self.logits is None else list(np.asarray(self.logits)[: len(self.plan.requests)])

    def row_embeddings(self) -> Sequence[Embedding]:
        """The embedding [embed] of each row, () where the plan wants none; waits for the device."""
        return () if self.embeddings is None else list(np.asarray(self.embeddings)[: len(self.plan.requests)])

    def token_logprobs(self, tokens: Sequence[Sequence[int]]) -> list[list[TokenLogprobs]] | None:
        """Log-probabilities of what each row gained, as far as it asked for them; None where no row did."""
        if not self.logprobs:
            return None
        own, rank, ids, values = (np.asarray(array).tolist() for array in self.logprobs)
        details: list[list[TokenLogprobs]] = []
        for row, (request, gained) in enumerate(zip(self.plan.requests, tokens, strict=True)):
            count = request.num_logprobs or 0
            top = tuple(zip(ids[row][:count], values[row][:count], strict=True))
            details.append([TokenLogprobs(token, own[row], rank[row], top) for token in gained])
        return details


class Runner:
    """Runs plans on the devices, in order, without waiting for them.

    Args:
        programs: compiled already.
        params: the weights, on the devices; others like them may take their place between two plans.
        caches: every layer's cache, on the devices; donated from step to step.
        mesh: the devices.
        slots: rows of the device state.
        pages: columns of its page table.
    """

    def __init__(
        self, programs: Programs, params: Any, caches: tuple[jax.Array, ...], mesh: Mesh, slots: int, pages: int
    ) -> None:
        self._programs = programs
        self.params = params
        self._caches = caches
        self._padding_slot = slots
        make = jax.jit(RowState.empty, static_argnums=(0, 1), out_shardings=NamedSharding(mesh, P()))
        self._state: RowState = make(slots, pages)

    def dispatch(self, plan: StepPlan) -> InFlight:
        """Start a plan; its results are on their way to the host when it is done."""
        if plan.copies:
            self._copy(plan.copies)
        flight = self._ragged(plan) if plan.kind == "step" else self._decode(plan)
        for array in jax.tree.leaves((flight.out, flight.logprobs, flight.logits, flight.embeddings)):
            array.copy_to_host_async()
        return flight

    def explained(self, failure: BaseException) -> BaseException:
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
        """Free the caches and the row state now, not when the garbage collector finds them."""
        for array in (*self._caches, *jax.tree.leaves(self._state)):
            array.delete()
        self.params = None

    def _ragged(self, plan: StepPlan) -> InFlight:
        tokens = bucket_for(len(plan.tokens), self._programs.token_buckets)
        rows = self._programs.rows_of(tokens)
        packed = pack_ragged(plan, self._programs.ragged_layout(tokens), rows, self._padding_slot)
        self._caches, self._state, out, last = self._programs.ragged(tokens)(
            self.params, self._caches, self._state, packed
        )
        logprobs = self._programs.logprobs(tokens)(self.params, last, out) if plan.wants_logprobs else ()
        logits = self._programs.logits(tokens)(self.params, last) if plan.wants_logits else None
        embeddings = self._programs.embeddings(tokens)(self.params, last) if plan.wants_embeddings else None
        return InFlight(plan, out, logprobs, logits, embeddings)

    def draw(self, logits: Logits, requests: Sequence[Request]) -> list[int]:
        """A token for each row of logits [n, vocab], by the wishes of its sequence; waits for the device."""
        size, program = self._programs.draw(len(requests))
        layout = draw_layout(size)
        position = np.array([request.total for request in requests], np.int32)
        padded = np.zeros((size, logits.shape[1]), np.float32)
        padded[: len(logits)] = logits
        packed = layout.pack(position=position, **wish_arrays(requests))
        return np.asarray(program(padded, packed))[: len(requests)].tolist()

    def _decode(self, plan: StepPlan) -> InFlight:
        rows = bucket_for(len(plan.slots), self._programs.row_buckets)
        packed = pack_decode(plan, self._programs.decode_layout(rows), rows, self._padding_slot)
        self._caches, self._state, out = self._programs.decode(rows, plan.greedy)(
            self.params, self._caches, self._state, packed
        )
        return InFlight(plan, out)

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for first in range(0, len(copies), COPIES_A_CALL):
            pairs = np.full((COPIES_A_CALL, 2), PADDING_PAGE, np.int32)
            some = copies[first : first + COPIES_A_CALL]
            pairs[: len(some)] = some
            self._caches = self._programs.copy()(self._caches, pairs)


def pack_ragged(plan: StepPlan, layout: Layout, rows: int, padding_slot: int) -> np.ndarray:
    """What a ragged step of `rows` rows is sent: the plan, rows beyond it empty and of the padding slot."""
    starts = np.full(rows + 1, plan.starts[-1], np.int32)
    starts[: len(plan.starts)] = plan.starts
    slots = _padded_slots(plan.slots, rows, padding_slot)
    # A sequence's last row alone has its slot: where several wrote to one, any of them could win.
    slots[:-1][slots[:-1] == slots[1:]] = padding_slot
    return layout.pack(
        tokens=plan.tokens,
        starts=starts,
        first=plan.first,
        emits=plan.emits,
        slots=slots,
        prompt=np.array([len(request.prompt) for request in plan.requests], np.int32),
        page_table=plan.page_table,
        **wish_arrays(plan.requests),
    )


def pack_decode(plan: StepPlan, layout: Layout, rows: int, padding_slot: int) -> np.ndarray:
    """What a decode loop of `rows` rows is sent: the plan, rows beyond it of the padding slot."""
    return layout.pack(
        steps=np.array(plan.steps, np.int32),
        slots=_padded_slots(plan.slots, rows, padding_slot),
        newest_pages=plan.newest_pages,
    )


def _padded_slots(slots: np.ndarray, rows: int, padding_slot: int) -> np.ndarray:
    padded = np.full(rows, padding_slot, np.int32)
    padded[: len(slots)] = slots
    return padded
