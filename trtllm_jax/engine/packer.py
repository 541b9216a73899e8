"""From a plan to dispatches: which programs run a step, and what the host sends them."""

from collections.abc import Sequence

import numpy as np

from trtllm_jax.engine.block_pool import PADDING_PAGE
from trtllm_jax.engine.dispatch import Dispatch, Key, size_of
from trtllm_jax.engine.edit_list import edit_arrays
from trtllm_jax.engine.packing import Layout
from trtllm_jax.engine.penalties import pack_begin
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.program_table import COPIES_PER_CALL
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.request import Logits, Request
from trtllm_jax.engine.row_outputs import AFTER_STEP
from trtllm_jax.engine.row_state import sampling_arrays
from trtllm_jax.engine.step_edits import StepEdits


class Packer:
    """Writes an engine's dispatches; reads plans and sequences, and changes neither."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._padding_slot = programs.sizes.limits.max_batch_size

    @property
    def vocab(self) -> int:
        """Ids of the model are 0 to vocab - 1."""
        return self._programs.vocab

    @property
    def edits_at_once(self) -> int:
        """Entries that one `StepEdits` may hold."""
        return self._programs.edits_at_once

    def step(self, plan: StepPlan) -> list[Dispatch]:
        """What runs a step, in order."""
        if plan.kind == "encode":
            return [self._encode(plan)]
        begins = [Dispatch(("begin",), {"packed": pack_begin(self._layout(("begin",)), one)}) for one in plan.penalised]
        return [*self._copies(plan), *begins, *(self._ragged(plan) if plan.kind == "ragged" else [self._decode(plan)])]

    def edited(self, plan: StepPlan, edits: StepEdits) -> list[Dispatch]:
        """What draws for the rows of a ragged step whose logits the host edits, once that step was dispatched."""
        requests = [plan.requests[row] for row in edits.rows]
        key = self._programs.edited(len(requests), sum(one.ids.size for one in edits.edits))
        rows = _padded_rows(edits.rows, size_of(key))
        packed = self._layout(key).pack(
            row=rows,
            guided=np.array([request.matcher is not None for request in requests]),
            position=np.array([request.total for request in requests], np.int32),
            **edit_arrays(requests, edits.edits),
            **sampling_arrays(requests),
        )
        inputs = {"packed": packed}
        if edits.allowed is not None:
            shape = self._programs.table[key].inputs["allowed"].shape
            inputs["allowed"] = _padded(edits.allowed, shape)
        dispatches = [Dispatch(key, inputs)]
        if any(request.num_logprobs is not None for request in requests):
            dispatches.append(Dispatch(("logprobs", size_of(key)), {"rows": rows}))
        return dispatches

    def draw(self, logits: Logits, requests: Sequence[Request]) -> list[Dispatch]:
        """What draws for sequences from logits [n, vocab] that users' functions have changed."""
        key = self._programs.after_step("draw", len(requests))
        position = np.array([request.total for request in requests], np.int32)
        packed = self._layout(key).pack(position=position, **sampling_arrays(requests))
        return [Dispatch(key, {"logits": _padded(logits, (size_of(key), logits.shape[1])), "packed": packed})]

    def extras(self, plan: StepPlan) -> list[int]:
        """The rows that a step's scores are of, in their order."""
        # A CPU's decode loop looks at rows that are not greedy one by one, as at those with extras.
        alone = plan.kind == "decode" and self._programs.sizes.on_cpu
        return plan.not_likeliest if alone else plan.extras

    def _copies(self, plan: StepPlan) -> list[Dispatch]:
        dispatches = []
        for group, copies in enumerate(plan.copies):
            for first in range(0, len(copies), COPIES_PER_CALL):
                pairs = np.full((COPIES_PER_CALL, 2), PADDING_PAGE, np.int32)
                some = copies[first : first + COPIES_PER_CALL]
                pairs[: len(some)] = some
                dispatches.append(Dispatch(("copy", group), {"pairs": pairs}))
        return dispatches

    def _ragged(self, plan: StepPlan) -> list[Dispatch]:
        key = self._programs.ragged(len(plan.tokens))
        rows = self._programs.sizes.rows_of(size_of(key))
        dispatches = [Dispatch(key, {"packed": pack_ragged(plan, self._layout(key), rows, self._padding_slot)})]
        if plan.extras:
            key = "extras", rows, self._programs.sizes.draw(rows, False, len(plan.extras)).extras
            dispatches.append(Dispatch(key, {"packed": self._pack_extras(plan, self._layout(key), rows)}))
        for source in AFTER_STEP:
            if some := plan.rows_with(source):
                key = self._programs.after_step(source, len(some))
                dispatches.append(Dispatch(key, {"rows": _padded_rows(some, size_of(key))}))
        return dispatches

    def _decode(self, plan: StepPlan) -> Dispatch:
        extras = self.extras(plan)
        key = self._programs.decode(len(plan.slots), plan.greedy, len(extras), plan.steps)
        layout = self._layout(key)
        packed = pack_decode(plan, extras, layout, size_of(key), self._padding_slot)
        return Dispatch(key, {"packed": packed})

    def _encode(self, plan: StepPlan) -> Dispatch:
        lengths = np.diff(plan.starts)
        key = self._programs.encode(len(lengths), int(lengths.max()))
        tokens, types = (np.zeros((len(lengths), int(lengths.max())), np.int32) for _ in range(2))
        for row, request in enumerate(plan.requests):
            tokens[row, : lengths[row]] = plan.tokens[plan.starts[row] : plan.starts[row + 1]]
            types[row, : len(request.token_types)] = request.token_types
        return Dispatch(key, {"packed": self._layout(key).pack(tokens=tokens, types=types, lengths=lengths)})

    def _pack_extras(self, plan: StepPlan, layout: Layout, rows: int) -> np.ndarray:
        slots = _padded_slots(_own_slots(plan, self._padding_slot), rows, self._padding_slot)
        return layout.pack(slots=slots, **_extra_arrays(plan, plan.extras))

    def _layout(self, key: Key) -> Layout:
        layout = self._programs.table[key].layout
        assert layout is not None
        return layout


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
        **{f"page_table_{group}": table for group, table in enumerate(plan.page_tables)},
        **sampling_arrays(plan.requests),
    )


def pack_decode(plan: StepPlan, extras: Sequence[int], layout: Layout, rows: int, padding_slot: int) -> np.ndarray:
    """What a decode loop of `rows` rows is sent: the plan, rows beyond it of the padding slot.

    `extras` are the rows with extras, where the program has room for any.
    """
    return layout.pack(
        steps=np.array(plan.steps, np.int32),
        slots=_padded_slots(plan.slots, rows, padding_slot),
        **{f"newest_pages_{group}": pages for group, pages in enumerate(plan.newest_pages)},
        **(_extra_arrays(plan, extras) if "num_extras" in layout.names else {}),
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


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array with zeros after its last row."""
    padded = np.zeros(shape, array.dtype)
    padded[: len(array)] = array
    return padded
