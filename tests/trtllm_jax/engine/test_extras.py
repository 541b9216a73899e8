"""The draws of some rows, with as much room as there is or as much as is needed, against each row by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch

from trtllm_jax.engine import sampler
from trtllm_jax.engine.extras import FEW_EXTRAS, Outcome, Rows, Scores, alternatives, draw_extras
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.penalties import Penalties, begin, begin_layout, pack_begin
from trtllm_jax.engine.request import Request
from trtllm_jax.engine.row_state import RowSamplingParams, sampling_arrays
from trtllm_jax.engine.sampling import Sampling

ROWS, SLOTS, LENGTH, INACTIVE = 12, 14, 24, 5
LAYOUT = begin_layout(LENGTH)
NOTHING_LEFT = 3
"""A row whose every token is banned."""
begun = jax.jit(partial(begin, LAYOUT))
sampled = jax.jit(sampler.sample)
EDITS = [
    None,
    LogitEdits(repetition=1.7, frequency=0.5),
    LogitEdits(no_repeat_ngram=2),
    LogitEdits(min_tokens=9, ends=frozenset(range(8)), presence=1.0),
]


@partial(jax.jit, static_argnums=0)
def draw(room: int | None, plan: Any, rows: Rows, logits: jax.Array, drawn: jax.Array, known: Penalties) -> Any:
    return draw_extras(room, plan, rows, lambda at: logits[at], drawn, known)


def some_requests(vocab: int) -> list[Request]:
    rng = np.random.default_rng(vocab)
    slots = rng.permutation(SLOTS)
    requests = []
    for row in range(ROWS):
        edits = LogitEdits(bias=np.full(vocab, -np.inf, np.float32)) if row == NOTHING_LEFT else EDITS[row % len(EDITS)]
        greedy = row % 3 == 0
        sampling = Sampling(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, seed=row, greedy=greedy)
        stops = edits.ends if edits else frozenset()
        prompt = rng.integers(0, 6, 3 + row).tolist()
        requests.append(Request(prompt, 9, sampling, stops, num_logprobs=None if edits else 3, edits=edits))
        requests[-1].generated += rng.integers(0, 6, row % 4).tolist()
        requests[-1].slot = int(slots[row])
    return requests


@pytest.mark.parametrize("vocab", [50, 20_000], ids=["several rows a turn", "one row a turn"])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(
    ("room", "extras"),
    [
        *((None, extras) for extras in ([], [4], [*range(FEW_EXTRAS)], [11, 2, 7, 0, 9, 5, 4, 10, 1], [*range(ROWS)])),
        *((FEW_EXTRAS, extras) for extras in ([], [4], [*range(FEW_EXTRAS)], [11, 5, 0])),
        *((ROWS, extras) for extras in ([4], [*range(1, 10)], [*range(ROWS)])),
    ],
)
def test_rows_with_extras_are_drawn_and_the_others_kept(
    room: int | None, extras: list[int], scored: bool, vocab: int
) -> None:
    requests = some_requests(vocab)
    known = Penalties.empty(SLOTS, vocab, LENGTH)
    for request in requests:
        if request.penalised:
            known = begun(known, pack_begin(LAYOUT, request))
    logits = np.random.default_rng(1).normal(size=(ROWS, vocab)).astype(np.float32) * 2
    drawn = np.arange(100, 100 + ROWS, dtype=np.int32)
    sampling = RowSamplingParams(**sampling_arrays(requests))
    positions = np.array([request.total for request in requests], np.int32)
    active = np.arange(ROWS) != INACTIVE
    rows = Rows(np.array([request.slot for request in requests], np.int32), active, positions, sampling)
    padding = [0] * (ROWS - len(extras))
    plan = {
        "num_extras": np.int32(len(extras)),
        "extras": np.array(extras + padding, np.int32),
        "penalised": np.array([requests[row].penalised for row in extras] + [False] * len(padding)),
        "scored": np.array(scored),
    }

    tokens, after, packed = draw(room, plan, rows, logits, drawn, known)
    scores = Scores.unpacked(np.asarray(packed))
    expected = known
    for row, request in enumerate(requests):
        if row not in extras or not active[row]:
            assert tokens[row] == drawn[row]
            continue
        changed = logits[row].copy()
        if request.penalised:
            request.edits.apply(changed, request.prompt, request.generated)
        place = extras.index(row)
        assert scores.token[place] == tokens[row]
        left = (changed > -np.inf).any()
        assert scores.outcome[place] == (Outcome.DRAWN if left else Outcome.NOTHING_LEFT)
        if left:
            one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], sampling)
            assert tokens[row] == sampled(changed[None], one, positions[row : row + 1])[0]
        token = int(tokens[row])
        if request.penalised:
            request.generated.append(token)
            expected = begun(expected, pack_begin(LAYOUT, request))
        if scored or room:
            found = torch.log_softmax(torch.from_numpy(logits[row]).double(), -1).numpy()
            best = np.argsort(-logits[row], kind="stable")[: alternatives(vocab)]
            np.testing.assert_allclose(scores.own[place], found[token], rtol=1e-5)
            assert scores.rank[place] == 1 + (logits[row] > logits[row, token]).sum()
            assert scores.ids[place].tolist() == best.tolist()
            np.testing.assert_allclose(scores.best[place], found[best], rtol=1e-5)
    for name, leaf in vars(after).items():
        np.testing.assert_array_equal(leaf, getattr(expected, name), err_msg=name)
