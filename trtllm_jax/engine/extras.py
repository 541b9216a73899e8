"""What steps do for some rows besides drawing a token: their logits are changed before, and what was drawn is scored.

Axes: r rows of a step, a rows with extras, v vocabulary, c alternatives.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import sampling
from pallas_kernels.devices import Platform
from trtllm_jax.engine import sampler
from trtllm_jax.engine.packing import Field
from trtllm_jax.engine.penalties import Penalties
from trtllm_jax.engine.request import MAX_LOGPROBS
from trtllm_jax.engine.row_state import RowSamplingParams

FEW_EXTRAS = 8
"""Rows that a program with extras has room for, where it has not room for all."""

LOGITS_PER_TURN = 1 << 14
"""Logits that a program computes at once where it goes through as many rows with extras as there are."""


class Outcome(IntEnum):
    """What came of a draw from changed logits."""

    INVALID = -1
    NOTHING_LEFT = 0
    DRAWN = 1


def outcome_of(logits: jax.Array) -> jax.Array:
    """What comes of a draw from changed logits [r, v]: int32 [r]."""
    highest = logits.max(-1)  # NaN where there is one
    outcome = jnp.where(highest == -jnp.inf, Outcome.NOTHING_LEFT, Outcome.DRAWN)
    return jnp.where(highest < jnp.inf, outcome, Outcome.INVALID).astype(jnp.int32)


class Scores(NamedTuple):
    """The results of extras for each of their rows; on the host the arrays have more leading axes.

    Attributes:
        token: int32 [a], what was drawn.
        outcome: int32 [a], an `Outcome`.
        own: float32 [a], the token's log-probability before any change.
        rank: int32 [a], its place among all there, from 1.
        ids: int32 [a, c], the likeliest tokens there.
        best: float32 [a, c], their log-probabilities.
    """

    token: Any
    outcome: Any
    own: Any
    rank: Any
    ids: Any
    best: Any

    @property
    def packed(self) -> jax.Array:
        """All of it as int32 [a, 4 + 2 c], because each array is copied to the host by itself."""
        columns = jnp.stack([self.token, self.outcome, _bits(self.own), self.rank], axis=1)
        return jnp.concatenate([columns, self.ids, _bits(self.best)], axis=1)

    @classmethod
    def unpacked(cls, packed: np.ndarray) -> "Scores":
        """The host's arrays of what was packed."""
        width = (packed.shape[-1] - 4) // 2
        floats = packed.view(np.float32)
        ids, best = packed[..., 4 : 4 + width], floats[..., 4 + width :]
        return cls(packed[..., 0], packed[..., 1], floats[..., 2], packed[..., 3], ids, best)


def _bits(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.int32)


def alternatives(vocab: int) -> int:
    """How many of the likeliest tokens are reported."""
    return min(MAX_LOGPROBS, vocab)


def no_scores(rows: int, room: int | None, vocab: int) -> jax.Array:
    """Packed scores of a program with `rows` rows before any is made: for its room, or for all rows in whole turns."""
    turn = _rows_per_turn(vocab)
    return jnp.zeros((room or -(-rows // turn) * turn, 4 + 2 * alternatives(vocab)), jnp.int32)


def _rows_per_turn(vocab: int) -> int:
    return min(FEW_EXTRAS, max(1, LOGITS_PER_TURN // vocab))


def extra_fields(rows: int) -> tuple[Field, ...]:
    """Which rows have extras, how many they are, which of them have penalties, and whether any reports scores."""
    return (
        Field("num_extras", ()),
        Field("extras", (rows,)),
        Field("penalised", (rows,), np.bool_),
        Field("scored", (), np.bool_),
    )


class Rows(NamedTuple):
    """The rows of a step as their extras see them.

    Attributes:
        slots: int32 [r], of the device state.
        active: bool [r], whether a token is drawn.
        positions: int32 [r], where it will stand in its sequence.
        sampling: each [r, ...].
    """

    slots: jax.Array
    active: jax.Array
    positions: jax.Array
    sampling: RowSamplingParams


Drawn = tuple[jax.Array, Penalties, jax.Array]
"""The tokens [r], the penalties that know of them, and packed `Scores`."""


def draw_extras(
    room: int | None,
    plan: dict[str, jax.Array],
    rows: Rows,
    logits_of: Callable[[jax.Array], jax.Array],
    drawn: jax.Array,
    penalties: Penalties,
    platform: Platform | None = None,
) -> Drawn:
    """Draw anew for the rows of `plan` (the unpacked `extra_fields`) that have extras; the others keep what they drew.

    With `room` for so many the same is done whatever is asked. With None as many rows are looked at as there are, a few
    at a time, and only for what they ask. `logits_of` gives the model's logits of some rows.
    """
    vocab = penalties.counts.shape[1]
    size = room or _rows_per_turn(vocab)
    scores = no_scores(drawn.shape[0], room, vocab)
    beyond = max(0, scores.shape[0] - drawn.shape[0])
    extras, changes = jnp.pad(plan["extras"], (0, beyond)), jnp.pad(plan["penalised"], (0, beyond))

    def turn(number: jax.Array | int, so_far: Drawn) -> Drawn:
        drawn, penalties, scores = so_far
        first = number * size
        at = lax.dynamic_slice_in_dim(extras, first, size)
        changing = lax.dynamic_slice_in_dim(changes, first, size)
        present = (first + jnp.arange(size) < plan["num_extras"]) & rows.active[at]
        slots, positions = rows.slots[at], rows.positions[at]
        params = jax.tree.map(lambda leaf: leaf[at], rows.sampling)
        original = logits_of(at).astype(jnp.float32)

        def change(logits: jax.Array) -> jax.Array:
            changed = penalties.changed(logits, slots, positions, params.stop_ids, decides=room is None)
            return jnp.where(changing[:, None], changed, logits)

        def sample(logits: jax.Array) -> jax.Array:
            return sampler.sample(logits, params, positions, platform)

        def score(tokens: jax.Array) -> jax.Array:
            return Scores(tokens, outcome, *sampler.logprobs(original, tokens, alternatives(vocab))).packed

        def leave_unscored(tokens: jax.Array) -> jax.Array:
            known = jnp.stack([tokens, outcome], axis=1)
            return jnp.pad(known, ((0, 0), (0, scores.shape[1] - known.shape[1])))

        logits = _if(room, changing.any(), change, lambda logits: logits, original)
        outcome = jnp.where(changing, outcome_of(logits), Outcome.DRAWN)
        tokens = _if(room, (params.temperature > 0).any(), sample, sampling.greedy, logits)
        found = _if(room, plan["scored"], score, leave_unscored, tokens)
        noted = jnp.where(present & changing, slots, penalties.counts.shape[0])
        return (
            drawn.at[jnp.where(present, at, drawn.shape[0])].set(tokens, mode="drop"),
            penalties.noted(noted, positions, tokens),
            lax.dynamic_update_slice_in_dim(scores, found, first, 0),
        )

    nothing = (drawn, penalties, scores)
    if room:
        return turn(0, nothing)
    result: Drawn = lax.fori_loop(0, -(-plan["num_extras"] // size), turn, nothing)
    return result


def _if(
    room: int | None,
    wanted: jax.Array,
    general: Callable[[jax.Array], jax.Array],
    simple: Callable[[jax.Array], jax.Array],
    operand: jax.Array,
) -> jax.Array:
    """What the general way gives, or where a program may decide when it runs, the simple one where that does."""
    result: jax.Array = general(operand) if room else lax.cond(wanted, general, simple, operand)
    return result
