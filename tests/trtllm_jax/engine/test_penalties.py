"""What the device knows of sequences and changes in their logits, against `LogitEdits.apply`."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.penalties import Penalties, begin, begin_layout, pack_begin
from trtllm_jax.engine.request import MAX_DEVICE_STOPS
from trtllm_jax.engine.row_state import sampling_arrays

from .some_edits import VOCAB, request_of, some_edits, texts

SLOTS, LENGTH = 3, 40
LAYOUT = begin_layout(LENGTH)

taken = jax.jit(lambda penalties, packed: begin(LAYOUT, penalties, packed))
noted = jax.jit(Penalties.noted)
changed = jax.jit(partial(Penalties.changed, decides=True))


def within_bounds(edits: LogitEdits) -> LogitEdits:
    bad = tuple(ids for ids in edits.bad if len(ids) == 1)
    ends = frozenset(sorted(token for token in edits.ends if token >= 0)[:MAX_DEVICE_STOPS])
    return replace(edits, bad=bad, ends=ends)


rows = st.tuples(st.integers(0, SLOTS - 1), texts.filter(bool), texts, texts, some_edits.map(within_bounds))


@given(st.lists(rows, min_size=1, max_size=6), st.sampled_from([0, 2, 3, 16]))
@settings(max_examples=150)
def test_the_device_does_what_the_host_would_do(taking: list[tuple], ngram: int) -> None:
    """Sequences take slots one after another, with what they generated before; more tokens come by steps."""
    penalties = Penalties.empty(SLOTS, VOCAB, LENGTH)
    holders = {}
    for slot, prompt, before, after, edits in taking:
        assume(len(prompt) + len(before) + len(after) < LENGTH)
        request = request_of(prompt, before, replace(edits, no_repeat_ngram=ngram))
        object.__setattr__(request, "stop_ids", edits.ends)
        assert request.penalised
        request.slot = slot
        penalties = taken(penalties, pack_begin(LAYOUT, request))
        for token in after:
            at = np.array([slot, SLOTS], np.int32)
            penalties = noted(penalties, at, np.array([request.total, 5]), np.array([token, 3]))
            request.generated.append(token)
        holders[slot] = request
    logits = np.random.default_rng(len(taking)).normal(size=(len(holders), VOCAB)).astype(np.float32)
    found = changed(
        penalties,
        logits.copy(),  # a CPU may read numpy's own memory, and later than this
        np.array([*holders], np.int32),
        np.array([request.total for request in holders.values()], np.int32),
        sampling_arrays([*holders.values()])["stop_ids"],
    )
    for row, request in enumerate(holders.values()):
        request.edits.apply(logits[row], request.prompt, request.generated)
    np.testing.assert_allclose(found, logits, rtol=1e-6, atol=1e-6)


def test_counts_end_where_their_numbers_do() -> None:
    penalties = replace(Penalties.empty(1, 2, 4), counts=np.array([[65534, 65535]], np.uint16))
    for _ in range(2):
        penalties = noted(penalties, np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32))
    assert penalties.counts.tolist() == [[65535, 65535]]
