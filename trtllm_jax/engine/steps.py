"""The compiled steps as pure functions: a ragged step, a decode loop, a page copy, and what follows a ragged step.

Axes: t tokens of a ragged step, r rows, p pages of a row, s slots of the device state, v vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import sampling
from pallas_kernels.devices import Platform
from trtllm_jax.engine import sampler
from trtllm_jax.engine.edit_list import edit_fields, edited
from trtllm_jax.engine.extras import Rows, Scores, alternatives, draw_extras, extra_fields, no_scores, outcome_of
from trtllm_jax.engine.packing import Field, Layout
from trtllm_jax.engine.penalties import Penalties
from trtllm_jax.engine.row_state import NO_TOKEN, RowSamplingParams, RowState, sampling_fields
from trtllm_jax.nn.batch import Batch, Caches, RaggedRows
from trtllm_jax.nn.cache_group import places
from trtllm_jax.nn.model import Model


def ragged_layout(tokens: int, rows: int, pages: tuple[int, ...]) -> Layout:
    """What the host sends with a ragged step; names as in `StepPlan`."""
    return Layout(
        (
            Field("tokens", (tokens,)),
            Field("starts", (rows + 1,)),
            Field("first", (rows,)),
            Field("emits", (rows,), np.bool_),
            Field("slots", (rows,)),
            Field("prompt", (rows,)),
            *(Field(f"page_table_{group}", (rows, width)) for group, width in enumerate(pages)),
            *sampling_fields(rows),
        )
    )


class Draw(NamedTuple):
    """How a program draws.

    Attributes:
        sampled: whether rows without extras may take other tokens than the likeliest.
        extras: how many rows with extras there is room for; None where it looks at as many as there are when it runs.
    """

    sampled: bool
    extras: int | None


def decode_layout(rows: int, new_pages: int, groups: int, how: Draw) -> Layout:
    """What the host sends with a decode loop; it is small, because it is sent for every token."""
    extras = extra_fields(rows) if how.extras != 0 else ()
    pages = (Field(f"newest_pages_{group}", (rows, new_pages, 2)) for group in range(groups))
    return Layout((Field("steps", ()), Field("slots", (rows,)), *pages, *extras))


def extras_layout(rows: int) -> Layout:
    """What the host sends with the extras of a ragged step."""
    return Layout((*extra_fields(rows), Field("slots", (rows,))))


def ragged_step(
    model: Model, layout: Layout, page_size: int, params: Any, caches: Caches, state: RowState, packed: jax.Array
) -> tuple[Caches, RowState, jax.Array, jax.Array]:
    """Compute every token of a flat batch of prompt chunks and decoding rows; draw a token where a row wants one.

    Returns the caches, the state, int32 [r, 2] (tokens gained, 0 or 1, and the token), and the residual stream
    [s - 1, embed] of each row's last token, zeros after the last row: what reads it comes in one size then.
    """
    plan = layout.unpack(packed)
    rows = replace(
        _rows_of(state, plan["slots"]),
        page_tables=tuple(plan[f"page_table_{group}"] for group in range(len(state.page_tables))),
        sampling=_row_sampling(plan),
    )
    starts, first = plan["starts"], plan["first"]
    decoding = first < 0
    active = (starts[1:] - starts[:-1] > 0) & ~(decoding & rows.done)
    first = jnp.where(decoding, rows.position, first)
    ragged = RaggedRows.of(plan["tokens"].shape[0], starts, first, active)
    lengths = ragged.lengths
    tokens = jnp.where(plan["tokens"] == NO_TOKEN, rows.token[ragged.row], plan["tokens"])
    batch = Batch.of_ragged_rows(tokens, ragged, rows.page_tables, plan["prompt"], page_size, execution=model.execution)
    x, caches = model.hidden(params, batch, caches)

    last = x[jnp.maximum(starts[1:] - 1, 0)]
    drawn = sampler.sample(model.logits(params, last), rows.sampling, lengths, model.platform)
    emitted = active & plan["emits"]
    rows = rows.advance(drawn, emitted, lengths)
    out = jnp.stack([emitted.astype(jnp.int32), drawn], axis=1)
    last = jnp.pad(last, ((0, state.done.shape[0] - 1 - last.shape[0]), (0, 0)))
    return caches, _put_rows(state, plan["slots"], rows), out, last


def decode_loop(
    model: Model,
    layout: Layout,
    how: Draw,
    max_steps: int,
    page_size: int,
    params: Any,
    caches: Caches,
    state: RowState,
    packed: jax.Array,
) -> tuple[Caches, RowState, jax.Array]:
    """Generate up to `steps` tokens for every row that is not done: on a CPU until all are, elsewhere `max_steps`.

    Returns the caches, the state, and int32 [r, 1 + max_steps]: tokens gained, then the tokens.
    """
    done = _decode(model, layout, how, max_steps, page_size, params, caches, state, None, packed)
    return done.caches, done.rows, done.out


def decode_loop_with_extras(
    model: Model,
    layout: Layout,
    how: Draw,
    max_steps: int,
    page_size: int,
    params: Any,
    caches: Caches,
    state: RowState,
    penalties: Penalties,
    packed: jax.Array,
) -> tuple[Caches, RowState, Penalties | None, jax.Array, jax.Array | None]:
    """As `decode_loop`, with room for rows with extras.

    Returns the penalties after the state, and last packed `Scores` [max_steps, ...] of those rows.
    """
    done = _decode(model, layout, how, max_steps, page_size, params, caches, state, penalties, packed)
    return done.caches, done.rows, done.penalties, done.out, done.scores


def _decode(
    model: Model,
    layout: Layout,
    how: Draw,
    max_steps: int,
    page_size: int,
    params: Any,
    caches: Caches,
    state: RowState,
    penalties: Penalties | None,
    packed: jax.Array,
) -> "_Carry":
    """What a decode loop leaves; its `rows` are the whole state. `penalties` are None without room for extras."""
    plan = layout.unpack(packed)
    rows = _with_newest_pages(_rows_of(state, plan["slots"]), plan)

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.step < plan["steps"]) & ~carry.rows.done.all()

    def one_token(carry: _Carry) -> _Carry:
        step, caches, rows, penalties, out, scores = carry
        active = ~rows.done
        positions = jnp.where(active, rows.position, 0)
        batch = Batch.of_decoding_rows(
            rows.token, positions, active, rows.page_tables, page_size, execution=model.execution
        )
        x, caches = model.hidden(params, batch, caches)
        logits = model.logits(params, x)
        if how.sampled:
            drawn = sampler.sample(logits, rows.sampling, positions + 1, model.platform)
        else:
            drawn = sampling.greedy(logits)
        if penalties is not None:
            about = Rows(plan["slots"], active, positions + 1, rows.sampling)
            drawn, penalties, now = draw_extras(
                how.extras, plan, about, lambda at: logits[at], drawn, penalties, model.platform
            )
            scores = lax.dynamic_update_index_in_dim(scores, now, step, 0)
        rows = rows.advance(drawn, active, positions + 1)
        out = out.at[:, 0].add(active.astype(jnp.int32))
        out = lax.dynamic_update_slice_in_dim(out, drawn[:, None], step + 1, axis=1)
        return _Carry(step + 1, caches, rows, penalties, out, scores)

    out = jnp.zeros((rows.done.shape[0], 1 + max_steps), jnp.int32)
    scores = None
    if penalties is not None:
        scores = jnp.stack([no_scores(rows.done.shape[0], how.extras, model.config.vocab)] * max_steps)
    carry = _Carry(jnp.int32(0), caches, rows, penalties, out, scores)
    if model.platform.on_cpu and max_steps > 1:
        carry = lax.while_loop(unfinished, one_token, carry)
    else:
        # A loop whose end the data decides makes a GPU's host wait for every iteration: these are all done, and rows
        # that have ended compute nothing that is kept.
        for _ in range(max_steps):
            carry = one_token(carry)
    return carry._replace(rows=_put_rows(state, plan["slots"], carry.rows))


def _with_newest_pages(rows: RowState, plan: dict[str, jax.Array]) -> RowState:
    """The rows with the pages that a decode dispatch adds to them."""
    tables = []
    for group, table in enumerate(rows.page_tables):
        newest = plan[f"newest_pages_{group}"]
        columns, pages = newest[..., 0], newest[..., 1]
        tables.append(table.at[jnp.arange(columns.shape[0])[:, None], columns].set(pages))
    return replace(rows, page_tables=tuple(tables))


class _Carry(NamedTuple):
    step: jax.Array
    caches: Caches
    rows: RowState
    penalties: Penalties | None
    out: jax.Array
    scores: jax.Array | None


def ragged_extras(
    model: Model,
    layout: Layout,
    room: int | None,
    params: Any,
    state: RowState,
    penalties: Penalties,
    last: jax.Array,
    out: jax.Array,
    packed: jax.Array,
) -> tuple[RowState, Penalties, jax.Array]:
    """Draw anew for the rows of a ragged step that have extras: its `last` rows and what it drew, `out` [r, 2].

    Returns the state and the penalties, and packed `Scores` [1, ...], whose tokens take the place of those in `out`.
    """
    plan = layout.unpack(packed)
    rows = _rows_of(state, plan["slots"])
    emitted = out[:, 0] > 0
    about = Rows(plan["slots"], emitted, rows.position, rows.sampling)
    drawn, penalties, scores = draw_extras(
        room, plan, about, lambda at: model.logits(params, last[at]), out[:, 1], penalties, model.platform
    )
    rows = rows.advance(drawn, emitted, rows.position)
    return _put_rows(state, plan["slots"], rows), penalties, scores[None]


def copy_pages(model: Model, group: int, caches: Caches, pairs: jax.Array) -> Caches:
    """The caches in which page pairs[i, 1] of a group's layers holds what page pairs[i, 0] held: pairs int32 [n, 2]."""
    copied, place_of = list(caches), places(model.cache_groups)
    for place in (place_of[layer] for layer in model.cache_groups[group].layers):
        copied[place] = jax.tree.map(lambda array: array.at[pairs[:, 1]].set(array[pairs[:, 0]]), caches[place])
    return tuple(copied)


def token_logprobs(model: Model, params: Any, last: jax.Array, drawn: jax.Array, rows: jax.Array) -> jax.Array:
    """Packed `Scores` [1, ...] of what was drawn, `drawn` [r, 2], for some `rows` [r] of a ragged step."""
    outcomes, tokens = drawn[:, 0], drawn[:, 1]
    scored = sampler.logprobs(model.logits(params, last[rows]), tokens, alternatives(model.config.vocab))
    return Scores(tokens, outcomes, *scored).packed[None]


def last_logits(model: Model, params: Any, last: jax.Array, rows: jax.Array) -> jax.Array:
    """The logits [r, v] in float32 of some `rows` [r] of a ragged step, for the host."""
    return model.logits(params, last[rows]).astype(jnp.float32)


def last_embeddings(model: Model, params: Any, last: jax.Array, rows: jax.Array) -> jax.Array:
    """The embeddings [r, embed] of what ends with some `rows` [r] of a ragged step."""
    return model.embeddings(params, last[rows])


def edited_layout(rows: int) -> Layout:
    """What the host sends with a draw from logits that the device changes, besides which ids are allowed."""
    return Layout(
        (
            Field("row", (rows,)),
            Field("guided", (rows,), np.bool_),
            Field("position", (rows,)),
            *edit_fields(rows),
            *sampling_fields(rows),
        )
    )


def edited_draw(
    model: Model, layout: Layout, params: Any, last: jax.Array, words: jax.Array, packed: jax.Array
) -> jax.Array:
    """A token for some rows of a ragged step from their changed logits: int32 [r, 2], an `Outcome` and the token.

    `words` as in `StepEdits.allowed`. A constraint comes last, and wins where the edits left nothing that it allows.
    """
    plan = layout.unpack(packed)
    logits = model.logits(params, last[plan["row"]]).astype(jnp.float32)
    changed = edited(logits, plan)
    bits = (words[:, :, None] >> jnp.arange(32)) & 1
    allowed = bits.reshape(bits.shape[0], -1)[:, : logits.shape[1]] != 0
    overruled = plan["guided"] & ~(allowed & (changed > -jnp.inf)).any(-1)
    final = jnp.where(allowed, jnp.where(overruled[:, None], logits, changed), -jnp.inf)
    drawn = sampler.sample(final, _row_sampling(plan), plan["position"], model.platform)
    return jnp.stack([outcome_of(final), drawn], axis=1)


def draw_layout(rows: int) -> Layout:
    """What the host sends with logits that it changed."""
    return Layout((Field("position", (rows,)), *sampling_fields(rows)))


def draw(platform: Platform, layout: Layout, logits: jax.Array, packed: jax.Array) -> jax.Array:
    """A token for each row of logits [r, v] that the host changed: int32 [r], as the ragged step would draw."""
    plan = layout.unpack(packed)
    return sampler.sample(logits, _row_sampling(plan), plan["position"], platform)


def _row_sampling(plan: dict[str, jax.Array]) -> RowSamplingParams:
    return RowSamplingParams(**{name: plan[name] for name in RowSamplingParams.__dataclass_fields__})


def _rows_of(state: RowState, slots: jax.Array) -> RowState:
    rows: RowState = jax.tree.map(lambda leaf: leaf[slots], state)
    return rows


def _put_rows(state: RowState, slots: jax.Array, rows: RowState) -> RowState:
    merged: RowState = jax.tree.map(lambda leaf, new: leaf.at[slots].set(new), state, rows)
    return merged
