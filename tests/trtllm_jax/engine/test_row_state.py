from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_jax.engine.packing import Layout
from trtllm_jax.engine.request import Request
from trtllm_jax.engine.row_state import (
    MAX_DEVICE_STOPS,
    NO_TOKEN,
    RowSamplingParams,
    RowState,
    sampling_arrays,
    sampling_fields,
)
from trtllm_jax.engine.sampling import Sampling
from trtllm_jax.requests.sampling_params import SamplingParams

ROWS = 6
ADVANCE = jax.jit(RowState.advance)


def request_of(params: SamplingParams | None = None, stop_ids: frozenset[int] = frozenset()) -> Request:
    return Request([1, 2, 3], 10, (params or SamplingParams()).resolved(), stop_ids)


def sent(*requests: Request, rows: int = ROWS) -> RowSamplingParams:
    """What the device gets of these sequences' sampling."""
    layout = Layout(sampling_fields(rows))
    return RowSamplingParams(**layout.unpack(jnp.asarray(layout.pack(**sampling_arrays(requests)))))


def test_wishes_arrive_as_they_were_made() -> None:
    sampled = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, seed=2**63 + 5, max_tokens=4)
    sampling = sent(request_of(sampled, frozenset({9, 4})), request_of())
    assert sampling.limit.tolist() == [13, 13, 0, 0, 0, 0]
    assert sampling.stop_ids[0].tolist() == [4, 9] + [NO_TOKEN] * (MAX_DEVICE_STOPS - 2)
    assert sampling.stop_ids[1].tolist() == [NO_TOKEN] * MAX_DEVICE_STOPS
    np.testing.assert_array_equal(sampling.temperature[:2], np.array([0.7, 0], np.float32))
    np.testing.assert_array_equal(sampling.top_p[:2], np.array([0.9, 1], np.float32))
    np.testing.assert_array_equal(sampling.min_p[:2], np.array([0.05, 0], np.float32))
    assert sampling.top_k[0] == 40
    assert sampling.seed.dtype == jnp.uint32


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0), SamplingParams(temperature=2, top_k=1), SamplingParams(top_p=0)],
)
def test_greedy_wishes_have_no_temperature(params: SamplingParams) -> None:
    assert sent(request_of(params)).temperature[0] == 0


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_a_seed_keeps_all_its_bits(seed: int) -> None:
    high, low = sent(request_of(SamplingParams(temperature=1, seed=seed))).seed[0].tolist()
    assert (high << 32) + low == seed


def test_the_device_gets_as_many_stop_ids_as_it_looks_for() -> None:
    sampling = sent(request_of(stop_ids=frozenset(range(40, 0, -2))))
    assert sampling.stop_ids[0].tolist() == list(range(2, 2 + 2 * MAX_DEVICE_STOPS, 2))


def test_wishes_that_int32_does_not_hold_mean_what_they_say() -> None:
    """A top_k of everything keeps everything; an id beyond every vocabulary, or none (-1), stops nothing."""
    huge = SamplingParams(temperature=1, top_k=2**40)
    sampling = sent(request_of(huge, frozenset({-1, 7, 2**31, 2**70})))
    assert sampling.top_k[0] == 2**31 - 1
    assert sampling.stop_ids[0].tolist() == [7] + [NO_TOKEN] * (MAX_DEVICE_STOPS - 1)


def test_an_empty_state_runs_nothing_and_has_a_row_for_padding() -> None:
    state = RowState.empty(4, (3, 1))
    assert [table.shape for table in state.page_tables] == [(5, 3), (5, 1)]
    assert state.done.tolist() == [True] * 5
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(state))
    assert {field.name: field.dtype for field in sampling_fields(1)} == {
        name: np.dtype(leaf.dtype).type for name, leaf in vars(state.sampling).items()
    }


ROW = st.tuples(
    st.integers(0, 3),  # the token before
    st.integers(0, 12),  # its position
    st.booleans(),  # done
    st.integers(0, 3),  # the token drawn
    st.booleans(),  # active
    st.sets(st.integers(0, 3), max_size=2),  # stop ids
    st.integers(0, 12),  # limit
)


@settings(max_examples=100)
@given(st.lists(ROW, min_size=ROWS, max_size=ROWS))
def test_active_rows_advance_until_a_stop_id_or_their_limit(
    rows: list[tuple[int, int, bool, int, bool, set[int], int]],
) -> None:
    token, position, done, sampled, active, stops, limit = zip(*rows, strict=True)
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, greedy=False)
    requests = [Request([0] * tokens, 0, sampling, frozenset(stop)) for tokens, stop in zip(limit, stops, strict=True)]
    state = RowState(
        jnp.array(token), jnp.array(position), jnp.array(done), jnp.zeros((ROWS, 1), jnp.int32), sent(*requests)
    )
    after = ADVANCE(state, jnp.array(sampled), jnp.array(active), jnp.array(position) + 1)
    for row, (old_token, old_position, was_done, new_token, runs, stop, tokens) in enumerate(rows):
        expected = (old_token, old_position, was_done)
        if runs:
            length = old_position + 2  # the drawn token included
            expected = (new_token, old_position + 1, new_token in stop or length >= tokens)
        assert (after.token[row], after.position[row], after.done[row]) == expected
    jax.tree.map(np.testing.assert_array_equal, after.sampling, state.sampling)
