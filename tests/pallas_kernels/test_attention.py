"""Paged attention against plain float64 attention over unpaged keys and values; every implementation runs the suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pallas_kernels.attention import cache_shape, paged_attention, write_pages

Attend = Callable[..., jax.Array]

IMPLEMENTATIONS: dict[str, Attend] = {"xla": paged_attention}

SCALE = 0.37
GARBAGE = 1e30
"""Fills every place of the cache that holds no token of a row: a result that looked there would show it."""


class Row(NamedTuple):
    """A sequence of `length` cached tokens, the last `new` of which ask; length 0 for one that does not count."""

    length: int
    new: int = 1


def chunk(cached: int, new: int) -> Row:
    return Row(cached + new, new)


NO_ROW = Row(0, 0)


@dataclass(frozen=True)
class Shape:
    heads: int
    group: int
    head_dim: int
    page_size: int


@dataclass(frozen=True)
class Case:
    """Random rows, once as a paged cache and once as each row's plain keys and values [length, h, d]."""

    queries: np.ndarray
    cache: jax.Array
    page_table: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]

    def expected(self) -> np.ndarray:
        """Causal softmax attention of each row's last tokens, in float64."""
        out = np.zeros(self.queries.shape)
        for row, length in enumerate(self.lengths):
            first, end = self.starts[row : row + 2]
            for token in range(first, end if length else first):
                visible = length - (end - token) + 1
                scores = np.einsum("hgd,shd->hgs", self.queries[token], self.keys[row][:visible]) * SCALE
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                out[token] = np.einsum("hgs,shd->hgd", weights, self.values[row][:visible])
        return out

    @property
    def answered(self) -> np.ndarray:
        """Which queries have a defined result."""
        counted = np.repeat(self.lengths > 0, np.diff(self.starts))
        return np.pad(counted, (0, len(self.queries) - len(counted)))


def make_case(
    rows: Sequence[Row],
    shape: Shape,
    *,
    tokens: int | None = None,
    pages: int | None = None,
    dtype: npt.DTypeLike = jnp.float32,
    seed: int = 0,
) -> Case:
    """`rows` over pages in random order, padded to `tokens` queries and `pages` columns of the page table."""
    rng = np.random.default_rng(seed)
    lengths = np.array([row.length for row in rows], np.int32)
    starts = np.cumsum([0, *(row.new for row in rows)]).astype(np.int32)
    owned = -(-lengths // shape.page_size)
    width = pages or max(owned)
    total = 1 + len(rows) * width

    cache = np.full(cache_shape(total, shape.heads, shape.page_size, shape.head_dim), GARBAGE, np.float32)
    cache *= rng.choice([-1, 1], cache.shape)
    free = list(rng.permutation(np.arange(1, total)))
    table = np.zeros((len(rows), width), np.int32)
    keys, values = [], []
    for row, length in enumerate(lengths):
        table[row, : owned[row]] = [free.pop() for _ in range(owned[row])]
        entries = rng.normal(size=(2, length, shape.heads, shape.head_dim)).astype(dtype)
        for position in range(length):
            page, offset = table[row, position // shape.page_size], position % shape.page_size
            cache[page, :, :, offset] = entries[:, position]
        keys.append(entries[0].astype(np.float64))
        values.append(entries[1].astype(np.float64))

    queries = rng.normal(size=(tokens or starts[-1], shape.heads, shape.group, shape.head_dim)).astype(np.float32)
    return Case(queries, jnp.asarray(cache, dtype), table, lengths, starts, keys, values)


def check(attend: Attend, case: Case, *, decode: bool = False) -> None:
    out = np.asarray(attend(case.queries, case.cache, case.page_table, case.lengths, None if decode else case.starts))
    assert out.shape == case.queries.shape
    assert out.dtype == case.queries.dtype
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[case.answered], case.expected()[case.answered], rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def attend(request: pytest.FixtureRequest) -> Attend:
    """An implementation, compiled once for all calls of equal shapes."""
    return jax.jit(partial(IMPLEMENTATIONS[request.param], scale=SCALE))


# Every group, head_dim and page size that models use, a page that does not divide the block of 128 tokens, and one
# that is larger.
SHAPES = [
    Shape(heads=1, group=1, head_dim=16, page_size=1),
    Shape(heads=2, group=2, head_dim=64, page_size=8),
    Shape(heads=3, group=3, head_dim=64, page_size=32),
    Shape(heads=2, group=4, head_dim=128, page_size=64),
    Shape(heads=1, group=8, head_dim=80, page_size=32),
    Shape(heads=2, group=5, head_dim=16, page_size=48),
    Shape(heads=1, group=7, head_dim=16, page_size=256),
]
SMALL = Shape(heads=2, group=6, head_dim=16, page_size=8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_over_contexts_of_every_length(attend: Attend, shape: Shape) -> None:
    """Contexts on both sides of the borders of a page and of a block, with padding rows between them."""
    rows = [Row(length) for length in (1, 127, 0, 128, 129, 300, 32, 33, 0)]
    check(attend, make_case(rows, shape), decode=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_of_every_size_in_one_batch(attend: Attend, shape: Shape) -> None:
    """First chunks and chunks behind a cached prefix, below, at and above the tile of 32; decoding rows; padding."""
    sizes = [(0, 1), (0, 33), (130, 1), (64, 32), (0, 0), (100, 29), (0, 5), (127, 70), (255, 1), (0, 0)]
    check(attend, make_case([chunk(*size) for size in sizes], shape, tokens=sum(new for _, new in sizes) + 19))


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
def test_bfloat16_cache_is_read_exactly(attend: Attend, decode: bool) -> None:
    rows = [Row(141), Row(4), Row(1)] if decode else [chunk(90, 45), chunk(0, 3), chunk(17, 1)]
    check(attend, make_case(rows, SMALL, dtype=jnp.bfloat16), decode=decode)


def test_result_has_the_dtype_of_the_queries(attend: Attend) -> None:
    case = make_case([chunk(40, 3), chunk(9, 1)], SMALL)
    narrow = jnp.asarray(case.queries, jnp.bfloat16)
    out = attend(narrow, case.cache, case.page_table, case.lengths, case.starts)
    assert out.dtype == jnp.bfloat16
    expected = replace(case, queries=np.asarray(narrow, np.float64)).expected()
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_tokens_of_a_row_without_length_disturb_nobody(attend: Attend) -> None:
    """A sequence that ended on the device stays in the batches that were planned before, tokens and all."""
    check(attend, make_case([chunk(20, 4), Row(0, 1), Row(51), Row(0, 40), chunk(0, 2)], SMALL))


ROWS, TOKENS, PAGES = 5, 96, 40


@hypothesis_settings(max_examples=30)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 70)), min_size=1, max_size=ROWS),
    seed=st.integers(0, 99),
)
def test_any_mixture_of_chunks(attend: Attend, sizes: list[tuple[int, int]], seed: int) -> None:
    rows: list[Row] = []
    for cached, wanted in sizes:
        new = min(wanted, TOKENS - sum(row.new for row in rows))
        rows.append(chunk(cached, new) if new else NO_ROW)
    rows += [NO_ROW] * (ROWS - len(rows))
    check(attend, make_case(rows, SMALL, tokens=TOKENS, pages=PAGES, seed=seed))


@hypothesis_settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 320), min_size=ROWS, max_size=ROWS), seed=st.integers(0, 99))
def test_any_mixture_of_decoding_rows(attend: Attend, lengths: list[int], seed: int) -> None:
    check(attend, make_case([Row(length) for length in lengths], SMALL, pages=PAGES, seed=seed), decode=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_changes_the_named_places_only(dtype: npt.DTypeLike) -> None:
    rng = np.random.default_rng(0)
    pages, heads, page_size, head_dim, tokens = 7, 3, 4, 8, 10
    before = jnp.asarray(rng.normal(size=cache_shape(pages, heads, page_size, head_dim)), dtype)
    k, v = rng.normal(size=(2, tokens, heads, head_dim)).astype(np.float32)
    places = rng.permutation([(page, offset) for page in range(1, pages) for offset in range(page_size)])[:tokens]
    places[[2, 5]] = [0, 1]  # two tokens of padding at one place
    page, offset = places.astype(np.int32).T

    after = np.asarray(write_pages(before, k, v, page, offset))

    expected = np.array(before)
    for token in range(tokens):
        expected[page[token], :, :, offset[token]] = k[token], v[token]
    assert after.dtype == before.dtype
    np.testing.assert_array_equal(after[1:], expected[1:])
    untouched = [0, 2, 3]
    np.testing.assert_array_equal(after[0, :, :, untouched], expected[0, :, :, untouched])


def test_attention_reads_what_was_written(attend: Attend) -> None:
    case = make_case([chunk(9, 4), chunk(0, 7), chunk(30, 1)], SMALL)
    cache = jnp.full(case.cache.shape, GARBAGE)
    for row, length in enumerate(case.lengths):
        positions = np.arange(length)
        page = case.page_table[row, positions // SMALL.page_size]
        cache = write_pages(cache, case.keys[row], case.values[row], page, positions % SMALL.page_size)
    check(attend, replace(case, cache=cache))
