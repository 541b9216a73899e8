"""Batches against loops over their rows."""

import jax.numpy as jnp
import numpy as np

from trtllm_jax.nn.batch import Batch, RaggedRows
from trtllm_jax.nn.execution import Execution

PAGE_SIZE = 4
BY_XLA = Execution(xla_only=True)
TABLE = np.array([[3, 1, 8], [2, 9, 7], [5, 6, 4]], np.int32)
TABLES = jnp.asarray(TABLE), jnp.asarray(TABLE + 10)
"""Of two cache groups."""


def test_ragged_rows() -> None:
    """A chunk behind five cached tokens, a row that has ended, and a prompt's beginning; then padding."""
    counts, first, active = np.array([3, 1, 6]), np.array([5, 2, 0]), np.array([True, False, True])
    starts, size, prompts = np.cumsum([0, *counts]), 13, np.array([11, 3, 6])
    rows = RaggedRows.of(size, *map(jnp.asarray, (starts, first, active)))
    batch = Batch.of_ragged_rows(jnp.arange(size), rows, TABLES, jnp.asarray(prompts), PAGE_SIZE)
    positions, page, offset, rope_lengths = np.zeros((4, size), np.int32)
    for row in np.flatnonzero(active):
        for index in range(counts[row]):
            place, position = starts[row] + index, first[row] + index
            positions[place], offset[place] = position, position % PAGE_SIZE
            page[place], rope_lengths[place] = TABLE[row, position // PAGE_SIZE], max(prompts[row], position + 1)
    assert batch.locations is None, "which the forward pass fills in for each layer"
    locations, others = batch.groups
    np.testing.assert_array_equal(batch.positions, positions)
    np.testing.assert_array_equal(locations.page, page)
    np.testing.assert_array_equal(others.page, np.where(page > 0, page + 10, 0))
    np.testing.assert_array_equal(locations.offset, offset)
    np.testing.assert_array_equal(locations.lengths, [8, 0, 6])
    np.testing.assert_array_equal(locations.starts, starts)
    real = page > 0
    np.testing.assert_array_equal(np.asarray(batch.rope_lengths)[real], rope_lengths[real])


def test_decoding_rows() -> None:
    positions, active = np.array([7, 0, 11]), np.array([True, False, True])
    batch = Batch.of_decoding_rows(jnp.arange(3), jnp.asarray(positions), jnp.asarray(active), TABLES, PAGE_SIZE)
    assert batch.locations is None, "which the forward pass fills in for each layer"
    locations, others = batch.groups
    assert locations.starts is None
    np.testing.assert_array_equal(locations.page, [1, 0, 4])
    np.testing.assert_array_equal(others.page, [11, 0, 14])
    np.testing.assert_array_equal(locations.offset, [3, 0, 3])
    np.testing.assert_array_equal(locations.lengths, [8, 0, 12])
    np.testing.assert_array_equal(batch.rope_lengths, [8, 1, 12])


def test_decoding_rows_of_several_tokens() -> None:
    """The last token of the last row is behind the page table's end."""
    first, active = jnp.array([7, 0, 10]), jnp.array([True, False, True])
    batch = Batch.of_decoding_rows(jnp.arange(9), first, active, TABLES, PAGE_SIZE)
    np.testing.assert_array_equal(batch.positions, [7, 8, 9, 0, 1, 2, 10, 11, 12])
    locations, others = batch.groups
    assert locations.starts is None
    np.testing.assert_array_equal(locations.page, [1, 8, 8, 0, 0, 0, 4, 4, 0])
    np.testing.assert_array_equal(others.page, [11, 18, 18, 0, 0, 0, 14, 14, 0])
    np.testing.assert_array_equal(locations.offset, [3, 0, 1, 0, 1, 2, 2, 3, 0])
    np.testing.assert_array_equal(locations.lengths, [10, 0, 13])
    np.testing.assert_array_equal(batch.rope_lengths, [8, 9, 10, 1, 2, 3, 11, 12, 13])


def test_whole_sequences() -> None:
    tokens = np.array([[5, 6, 7], [8, 9, 0]])
    batch = Batch.of_sequences(jnp.asarray(tokens), jnp.array([3, 2]), BY_XLA)
    assert batch.groups == ()
    assert batch.execution.xla_only
    np.testing.assert_array_equal(batch.tokens, tokens.ravel())
    np.testing.assert_array_equal(batch.positions, [0, 1, 2] * 2)
    np.testing.assert_array_equal(batch.rope_lengths, [3, 3, 3, 2, 2, 2])
