from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_jax.engine.packing import Field, Layout

LAYOUT = Layout(
    (
        Field("scalar", ()),
        Field("ids", (5,)),
        Field("flags", (4,), np.bool_),
        Field("table", (3, 4)),
        Field("empty", (0, 4)),
        Field("scores", (2, 3), np.float32),
        Field("words", (3, 2), np.uint32),
        Field("last", (2, 1, 2), np.float32),
    )
)
UNPACK = jax.jit(LAYOUT.unpack)


def patterns(field: Field, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Arrays of any bits: extreme integers, infinities, NaNs with a payload, subnormal numbers."""
    bits = st.integers(0, 1 if field.dtype is np.bool_ else 2**32 - 1)
    count = int(np.prod(shape))
    numbers = st.lists(bits, min_size=count, max_size=count).map(lambda drawn: np.array(drawn, np.uint32))
    if field.dtype is np.bool_:
        return numbers.map(lambda array: array.astype(np.bool_).reshape(shape))
    return numbers.map(lambda array: array.view(field.dtype).reshape(shape))


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """An array for each field, often shorter than the field."""
    drawn = {}
    for field in LAYOUT.fields:
        shape = tuple(draw(st.integers(0, extent)) if draw(st.booleans()) else extent for extent in field.shape)
        drawn[field.name] = draw(patterns(field, shape))
    return drawn


def bits_of(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array if array.dtype == np.bool_ else array.view(np.uint32)


@settings(max_examples=150)
@given(arrays())
def test_what_was_packed_comes_out_bit_for_bit_with_zeros_around(packed: dict[str, np.ndarray]) -> None:
    vector = LAYOUT.pack(**packed)
    assert (vector.dtype, vector.shape) == (np.int32, (LAYOUT.size,))
    unpacked = UNPACK(vector)
    assert set(unpacked) == {field.name for field in LAYOUT.fields}
    for field in LAYOUT.fields:
        expected = np.zeros(field.shape, field.dtype)
        expected[tuple(slice(extent) for extent in packed[field.name].shape)] = packed[field.name]
        assert (unpacked[field.name].shape, unpacked[field.name].dtype) == (field.shape, field.dtype)
        np.testing.assert_array_equal(bits_of(unpacked[field.name]), bits_of(expected))


def complete(**changed: np.ndarray) -> dict[str, np.ndarray]:
    return {field.name: np.zeros(field.shape, field.dtype) for field in LAYOUT.fields} | changed


def test_fields_do_not_overlap() -> None:
    vectors = [LAYOUT.pack(**complete(**{field.name: np.ones(field.shape, np.int32)})) != 0 for field in LAYOUT.fields]
    np.testing.assert_array_equal(np.sum(vectors, axis=0), np.ones(LAYOUT.size))


def test_numbers_of_other_widths_are_converted() -> None:
    unpacked = UNPACK(
        LAYOUT.pack(**complete(ids=np.array([-1, 2], np.int64), scores=np.array([[0.5]], np.float64), flags=[2, 0]))
    )
    assert unpacked["ids"].tolist() == [-1, 2, 0, 0, 0]
    assert unpacked["scores"][0, 0] == 0.5
    assert unpacked["flags"].tolist() == [True, False, False, False]


@pytest.mark.parametrize(("name", "shape"), [("ids", (6,)), ("table", (3, 5)), ("table", (4, 4)), ("scalar", (1,))])
def test_an_array_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, IndexError)):
        LAYOUT.pack(**complete(**{name: np.zeros(shape, np.int32)}))


def test_unknown_and_missing_names_are_refused() -> None:
    with pytest.raises(TypeError, match="no such fields: idz"):
        LAYOUT.pack(**complete(idz=np.zeros(5)))
    arrays = complete()
    del arrays["words"]
    with pytest.raises(KeyError, match="words"):
        LAYOUT.pack(**arrays)
