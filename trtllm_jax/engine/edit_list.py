"""A sequence's logit edits as a list that the device applies, with the same result as `LogitEdits.apply`."""

from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trtllm_jax.common.numbers import INT32_MAX
from trtllm_jax.engine.packing import Field
from trtllm_jax.engine.request import MAX_EDITS, Request

EDITS_PER_ROW = 256
"""Entries a row for which a program with many rows has room."""


class Kind(IntEnum):
    """What an entry does with its id's logit."""

    NOTHING = 0
    ADD = 1
    """Adds the value."""
    OCCURRED = 2
    """Is penalised as an id that occurred; the value is how often, for the frequency penalty."""
    BAN = 3
    """Is forbidden."""
    END = 4
    """Is forbidden, unless all such entries together would leave nothing."""
    REPEATS = 5
    """The same, after those."""


class EditList(NamedTuple):
    """Entries in any order, all [n]; ids of one kind occur once. Good until the sequence's next token is known."""

    ids: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


NONE = EditList(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))


def room_for(rows: int) -> int:
    """Entries that a program of so many rows takes."""
    return max(MAX_EDITS, EDITS_PER_ROW * rows)


def edit_fields(rows: int) -> tuple[Field, ...]:
    """What the host sends of the lists of `rows` rows."""
    room = room_for(rows)
    return (
        Field("edit_row", (room,)),
        Field("edit_id", (room,)),
        Field("edit_kind", (room,)),
        Field("edit_value", (room,), np.float32),
        Field("repetition", (rows,), np.float32),
        Field("presence", (rows,), np.float32),
        Field("frequency", (rows,), np.float32),
    )


def edit_arrays(requests: Sequence[Request], lists: Sequence[EditList]) -> dict[str, np.ndarray]:
    """The host arrays of these fields, ready to pack."""
    edits = [request.edits for request in requests]
    return {
        "edit_row": np.repeat(np.arange(len(lists), dtype=np.int32), [one.ids.size for one in lists]),
        "edit_id": np.concatenate([one.ids for one in lists]),
        "edit_kind": np.concatenate([one.kinds for one in lists]),
        "edit_value": np.concatenate([one.values for one in lists]),
        "repetition": np.array([one.repetition if one else 1 for one in edits], np.float32),
        "presence": np.array([one.presence if one else 0 for one in edits], np.float32),
        "frequency": np.array([one.frequency if one else 0 for one in edits], np.float32),
    }


def edit_list(request: Request) -> EditList:
    """What its edits change before the next token; users' functions and the constraint are not in it."""
    edits = request.edits
    if edits is None:
        return NONE
    parts = []
    if edits.bias is not None:
        parts.append(_entries(Kind.ADD, edits.biased, edits.bias[edits.biased]))
    if edits.penalises:
        parts.append(
            _entries(Kind.OCCURRED, *request.occurrences.of(request.prompt, request.generated, edits.ignored_prompt))
        )
    bans = edits.bans(request.prompt, request.generated)
    parts += [_bans(kind, ids) for kind, ids in zip((Kind.BAN, Kind.END, Kind.REPEATS), bans, strict=True) if ids]
    if len(parts) == 1:
        return parts[0]
    return EditList(*map(np.concatenate, zip(*parts, strict=True))) if parts else NONE


def _bans(kind: Kind, ids: Collection[int]) -> EditList:
    # A user's stop ids may be any numbers; what is no int32 is no token's either.
    known = np.array([token for token in ids if 0 <= token <= INT32_MAX], np.int32)
    return _entries(kind, known, np.zeros(known.size, np.float32))


def _entries(kind: Kind, ids: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> EditList:
    return EditList(ids, np.full(ids.size, kind, np.int32), values)


def edited(logits: jax.Array, plan: dict[str, jax.Array]) -> jax.Array:
    """Logits [r, v] in float32, changed by the unpacked `edit_fields`: penalties first and bans last."""
    row, ids, kinds, value = (plan[f"edit_{name}"] for name in ("row", "id", "kind", "value"))

    def rows_of(kind: Kind) -> jax.Array:
        """The row of each entry of this kind; beyond the last one for others, which nothing then reads or writes."""
        return jnp.where(kinds == kind, row, logits.shape[0])

    logits = logits.at[rows_of(Kind.ADD), ids].add(value, mode="drop")
    at = rows_of(Kind.OCCURRED)
    score = logits.at[at, ids].get(mode="fill", fill_value=0)
    repetition = plan["repetition"][row]
    score = jnp.where(score > 0, score / repetition, score * repetition)
    score -= jnp.where(value > 0, plan["presence"][row] + plan["frequency"][row] * value, 0)
    logits = logits.at[at, ids].set(score, mode="drop")
    logits = logits.at[rows_of(Kind.BAN), ids].set(-jnp.inf, mode="drop")
    left = (logits > -jnp.inf).sum(-1)
    for kind in (Kind.END, Kind.REPEATS):
        at = rows_of(kind)
        new = logits.at[at, ids].get(mode="fill", fill_value=-jnp.inf) > -jnp.inf
        lost = jnp.zeros_like(left).at[at].add(new, mode="drop")
        made = lost < left
        logits = logits.at[jnp.where(made[row], at, logits.shape[0]), ids].set(-jnp.inf, mode="drop")
        left = jnp.where(made, left - lost, left)
    return logits
