from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import pieces
from checkpoints.pieces import cast, chunk_shape, contiguous_step, grid

SHAPES = st.lists(st.integers(0, 12), max_size=4).map(tuple)


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """Bounds are checked where they bite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 64)
        yield


@given(SHAPES)
def test_contiguous_windows_follow_each_other_and_cover_the_array(shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    parts = [array[tuple(slice(*part) for part in window)] for window in grid(shape, contiguous_step(shape, 8))]
    assert all(part.nbytes <= 64 for part in parts)
    assert np.concatenate([part.ravel() for part in parts] or [[]]).tolist() == array.ravel().tolist()


def test_windows_are_as_large_as_they_may_be() -> None:
    assert contiguous_step((100, 4), 4) == (4, 4)
    assert contiguous_step((100, 40), 4) == (1, 16)
    assert contiguous_step((), 8) == ()


@given(SHAPES, st.sets(st.sampled_from("abcd")))
def test_chunks_are_bounded_and_no_larger_than_the_array(shape: tuple[int, ...], split: set[str]) -> None:
    chunk = chunk_shape("abcd"[: len(shape)], shape, frozenset(split), 4)
    assert math.prod(chunk) * 4 <= 64
    assert all(1 <= part <= max(1, whole) for part, whole in zip(chunk, shape, strict=True))


def test_chunks_follow_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 14)
    split = frozenset({"heads"})
    assert chunk_shape(("embed", "heads"), (64, 16), split, 2) == (64, 2)  # eight devices read their own chunks
    assert chunk_shape(("embed", "heads"), (64, 9), split, 2) == (64, 3)
    assert chunk_shape(("embed", "heads"), (64, 13), split, 2) == (64, 13)
    assert chunk_shape(("embed", "heads"), (8192, 16), split, 2) == (4096, 2)
    assert chunk_shape(("embed", "heads"), (4, 16), split, 2) == (4, 16)


@pytest.mark.parametrize("pair", [*itertools.product((np.float32, np.float16, ml_dtypes.bfloat16), repeat=2)], ids=str)
def test_rounding_is_numpys(pair: tuple[type, type]) -> None:
    values = np.random.default_rng(0).standard_normal(100).astype(pair[0])
    np.testing.assert_array_equal(cast(values, pair[1], "w"), values.astype(pair[1]))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_value_that_becomes_infinite_is_an_error_that_names_the_tensor(dtype: type) -> None:
    with pytest.raises(ValueError, match="a/b has values that float16 cannot hold; choose bfloat16 or float32"):
        cast(np.array([1.0, 1e6], dtype), np.float16, "a/b")
    assert np.isinf(cast(np.array([np.inf, 1.0], dtype), np.float16, "a/b")).tolist() == [True, False]
