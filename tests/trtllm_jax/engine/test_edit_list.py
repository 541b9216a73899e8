"""What the device changes in logits, against `LogitEdits.apply`, whose own tests compare it with transformers."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_jax.engine.edit_list import EDITS_PER_ROW, NONE, Kind, edit_arrays, edit_fields, edit_list, edited, room_for
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.occurrences import Occurrences
from trtllm_jax.engine.packing import Layout
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import MAX_BIASED, MAX_DEVICE_STOPS, MAX_EDITS, MAX_NGRAM, Request
from trtllm_jax.engine.step_edits import step_edits

from .some_edits import VOCAB, request_of, some_edits, texts

ROWS = 4
LAYOUT = Layout(edit_fields(ROWS))
on_device = jax.jit(lambda logits, packed: edited(logits, LAYOUT.unpack(packed)))


@given(st.lists(st.tuples(texts.filter(bool), texts, st.none() | some_edits), min_size=1, max_size=ROWS))
@settings(max_examples=150, deadline=None)
def test_a_list_does_what_the_host_would_do(rows: list[tuple[list[int], list[int], LogitEdits | None]]) -> None:
    logits = np.random.default_rng(len(rows)).normal(size=(ROWS, VOCAB)).astype(np.float32)
    requests = [request_of(*row) for row in rows]
    packed = LAYOUT.pack(**edit_arrays(requests, [edit_list(request) for request in requests]))
    expected = logits.copy()
    for place, (prompt, generated, edits) in enumerate(rows):
        if edits is not None:
            in_range = frozenset(token for token in edits.ends if token >= 0)
            LogitEdits(**{**vars_of(edits), "ends": in_range}).apply(expected[place], prompt, generated)
    np.testing.assert_allclose(on_device(logits, packed), expected, rtol=1e-6, atol=1e-6)


def vars_of(edits: LogitEdits) -> dict[str, object]:
    return {name: getattr(edits, name) for name in LogitEdits.__dataclass_fields__}


@given(prompt=texts.filter(bool), pieces=st.lists(texts, max_size=5), ignored=st.integers(0, 16))
def test_occurrences_are_counted_as_they_come(prompt: list[int], pieces: list[list[int]], ignored: int) -> None:
    occurrences = Occurrences()
    generated: list[int] = []
    for piece in [[], *pieces]:
        generated += piece
        found = occurrences.of(prompt, generated, ignored)
        assert set(found.ids.tolist()) == {*prompt, *generated}
        counted = {token: count for token, count in zip(*map(np.ndarray.tolist, found), strict=True) if count}
        assert counted == Counter([*prompt[ignored:], *generated])


def test_many_new_ids_make_room() -> None:
    generated = list(range(1000))
    found = Occurrences().of([5], generated, 0)
    assert found.ids.size == 1000
    assert found.counts.tolist() == [2.0 if token == 5 else 1.0 for token in found.ids.tolist()]


def step_of(requests: list[Request]) -> StepPlan:
    none = np.zeros(0, np.int32)
    emits = np.ones(len(requests), bool)
    return StepPlan("ragged", tuple(requests), none, none, none, none, none, none, emits, ~emits, 1)


def test_lists_that_do_not_fit_one_program_go_to_several() -> None:
    sizes = [MAX_EDITS // 2 - 10, MAX_EDITS // 2, 20, 3 * MAX_EDITS // 4, MAX_EDITS // 4, 1]
    for_lists = LogitEdits(repetition=2.0, bad=((1, 2),))
    requests = [request_of(list(range(size)), [], for_lists) for size in sizes]
    groups = step_edits(step_of(requests), 1 << 15, MAX_EDITS)
    assert [list(group.rows) for group in groups] == [[0, 1], [2, 3], [4, 5]]
    assert [sum(one.ids.size for one in group.edits) for group in groups] == [
        MAX_EDITS - 10, 20 + 3 * MAX_EDITS // 4, MAX_EDITS // 4 + 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("edits", "drawn_on_host"),
    [
        (LogitEdits(repetition=1.1, bad=((1, 2),)), True),
        (LogitEdits(no_repeat_ngram=MAX_NGRAM + 1), True),
        (LogitEdits(bias=np.ones(MAX_EDITS + 1, np.float32)), True),
        (LogitEdits(processors=(lambda *_: None,)), True),
        (LogitEdits(batched=True), True),
        (LogitEdits(min_tokens=3, ends=frozenset(range(MAX_DEVICE_STOPS + 1))), False),
        (LogitEdits(bad=((1, 2),)), False),
        (LogitEdits(bias=np.ones(MAX_BIASED + 1, np.float32)), False),
        (LogitEdits(constraint="start: /a/"), False),
        # The rest is the step's own.
        (LogitEdits(repetition=1.1, presence=0.5, frequency=0.5), None),
        (LogitEdits(no_repeat_ngram=MAX_NGRAM), None),
        (LogitEdits(min_tokens=3, ends=frozenset(range(MAX_DEVICE_STOPS))), None),
        (LogitEdits(bias=np.eye(1, MAX_EDITS + 1, dtype=np.float32)[0], bad=((1,), (2,))), None),
    ],
)
def test_who_draws(edits: LogitEdits, drawn_on_host: bool | None) -> None:
    plan = step_of([request_of([1] * (MAX_EDITS + 1), [], edits)])
    expected = {True: ([0], [], []), False: ([], [0], []), None: ([], [], [0])}[drawn_on_host]
    assert (plan.drawn_on_host, plan.edited, plan.extras) == expected


def test_a_program_has_room_for_one_sequence_and_for_many() -> None:
    assert [room_for(rows) for rows in (1, 16, 64, 256)] == [MAX_EDITS, MAX_EDITS, MAX_EDITS, 256 * EDITS_PER_ROW]
    assert edit_list(request_of([1], [], None)) == NONE
    assert Kind.NOTHING == 0, "what is padded with zeros does nothing"


def test_padding_changes_nothing_where_a_logit_is_infinite() -> None:
    logits = jnp.full((ROWS, VOCAB), -jnp.inf)
    packed = LAYOUT.pack(**edit_arrays([], [NONE]))
    np.testing.assert_array_equal(on_device(logits, packed), logits)
