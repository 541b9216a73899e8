"""Paged attention against plain float64 attention over unpaged keys and values; every implementation runs the suite.

On a CPU nearly all the time goes into compiling, so shapes are shared and each implementation there has its own part of
them. On a GPU the compiled kernels run all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.attention import (
    HeadNorms,
    PageLocations,
    Rotation,
    Scoring,
    append_and_attend,
    cache_shape,
    mosaic_hopper,
    pallas_decode,
    pallas_ragged,
    tuned,
)
from pallas_kernels.attention.pallas_decode import decode_attention
from pallas_kernels.attention.pallas_ragged import ragged_attention
from pallas_kernels.attention.tuned import DecodeConfig, RaggedConfig
from pallas_kernels.devices import Platform
from pallas_kernels.norm import Norm

Attend = Callable[..., tuple[jax.Array, jax.Array]]


def by_kernels(decode: DecodeConfig, ragged: RaggedConfig) -> Attend:
    """The kernels, interpreted."""

    def attend(
        qkv: jax.Array, cache: jax.Array, locations: PageLocations, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        if locations.starts is None:
            return decode_attention(qkv, cache, locations, config=decode, interpret=True, **options)
        return ragged_attention(qkv, cache, locations, config=ragged, interpret=True, **options)

    return attend


def compiled_as_for_long_contexts(
    qkv: jax.Array, cache: jax.Array, locations: PageLocations, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """The compiled kernels with the largest tiles and the most splits, which tests' batches are too small for."""
    tokens, heads, planes, dim = qkv.shape
    entry = max(qkv.dtype.itemsize, cache.dtype.itemsize)
    if locations.starts is None:
        decode = replace(tuned.decode_config(tokens, heads, dim, entry, 10**6), min_share=32)
        return decode_attention(qkv, cache, locations, config=decode, **options)
    ragged = tuned.ragged_config(tuned.LONG_STEP, planes - 2, dim, entry)
    return ragged_attention(qkv, cache, locations, config=ragged, **options)


UNSEEN = np.nan
"""Fills every place of the cache that holds no token of a row, and tokens of no row, as weights that are not finite
may have left them."""


class Row(NamedTuple):
    """A sequence of `length` tokens, the last `new` of which are in the batch; length 0 for one that does not count."""

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
class Kind:
    """A kind of attention; `rotated` is the share of each head's channels that is."""

    soft_cap: float | None = None
    window: int | None = None
    chunk: int | None = None
    rotated: float = 1.0
    sinks: bool = False
    slopes: bool = False
    norms: bool = False
    scale: float = 0.37

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.scale, self.soft_cap, self.window, chunk=self.chunk)


PLAIN = Kind()

NORM = {"eps": 0.1, "offset": 1.0}
"""Of queries and keys: an epsilon that is felt, and weights that are stored less one."""


@dataclass(frozen=True)
class Case:
    """Random rows over pages, as the functions take them, and each row's keys and values so far [length, h, d]."""

    kind: Kind
    qkv: np.ndarray
    cache: jax.Array
    page: np.ndarray
    offset: np.ndarray
    page_table: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    angles: np.ndarray
    sinks: np.ndarray
    slopes: np.ndarray
    norm_weights: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]

    @property
    def group(self) -> int:
        return self.qkv.shape[2] - 2

    @property
    def queries(self) -> np.ndarray:
        """The new tokens' queries [t, h, g, d] in float64, normalised and rotated."""
        return self._ready(self.qkv[:, :, : self.group], self.norm_weights[0])

    @property
    def new_keys(self) -> np.ndarray:
        """The new tokens' keys [t, h, d] in float64, normalised and rotated."""
        return self._ready(self.qkv[:, :, self.group : -1], self.norm_weights[1])[:, :, 0]

    def _ready(self, heads: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Heads [t, h, n, d] normalised, then channels i and i + r / 2 of the first r turned as complex numbers."""
        exact = heads.astype(np.float64)
        if self.kind.norms:
            squares = (exact**2).mean(-1, keepdims=True) + NORM["eps"]
            exact = exact / np.sqrt(squares) * (weight.astype(np.float64) + NORM["offset"])
        pairs = self.angles.shape[1]
        first, second, still = np.split(exact, (pairs, 2 * pairs), axis=-1)
        turned = (first + 1j * second) * np.exp(1j * self.angles.astype(np.float64))[:, None, None]
        return np.concatenate([turned.real, turned.imag, still], axis=-1)

    def locations(self, *, decode: bool) -> PageLocations:
        return PageLocations(self.page, self.offset, self.page_table, self.lengths, None if decode else self.starts)

    def run(self, attend: Attend, *, decode: bool) -> tuple[jax.Array, jax.Array]:
        angles = self.angles
        rotation = Rotation(np.cos(angles), np.sin(angles)) if self.kind.rotated else None
        own = {"sinks": self.sinks if self.kind.sinks else None, "slopes": self.slopes if self.kind.slopes else None}
        own["norms"] = HeadNorms(*(Norm(weight, **NORM) for weight in self.norm_weights)) if self.kind.norms else None
        arrays = (self.qkv, self.cache, self.locations(decode=decode), rotation, own)
        qkv, cache, locations, rotation, own = jax.tree.map(jnp.asarray, arrays)
        return attend(qkv, cache, locations, scoring=self.kind.scoring, rotation=rotation, **own)

    def expected(self) -> np.ndarray:
        """Causal softmax attention of each row's last tokens, in float64."""
        queries = self.queries
        new_keys = self.new_keys.astype(self.cache.dtype).astype(np.float64)
        new_values = self.qkv[:, :, -1].astype(self.cache.dtype).astype(np.float64)
        out = np.zeros(queries.shape)
        for row, length in enumerate(self.lengths):
            first, end = self.starts[row : row + 2]
            keys = np.concatenate([self.keys[row], new_keys[first:end]])
            values = np.concatenate([self.values[row], new_values[first:end]])
            for token in range(first, end if length else first):
                visible = length - (end - token) + 1
                first_seen = max(0, visible - (self.kind.window or visible))
                if self.kind.chunk:
                    of_last = (visible - 1) // self.kind.chunk
                    first_seen = next(place for place in range(visible) if place // self.kind.chunk == of_last)
                seen = slice(first_seen, visible)
                scores = np.einsum("hgd,shd->hgs", queries[token], keys[seen]) * self.kind.scale
                if cap := self.kind.soft_cap:
                    scores = cap * np.tanh(scores / cap)
                if self.kind.slopes:
                    behind = visible - 1 - np.arange(visible)[seen]
                    scores -= self.slopes.astype(np.float64)[..., None] * behind
                weights = np.exp(scores)
                total = weights.sum(-1) + (np.exp(self.sinks.astype(np.float64)) if self.kind.sinks else 0)
                out[token] = np.einsum("hgs,shd->hgd", weights, values[seen]) / total[..., None]
        return out

    def expected_cache(self) -> np.ndarray:
        """The cache with every kept token's normalised and rotated key and its value in its place."""
        cache = np.asarray(self.cache).copy()
        keys = self.new_keys
        for token in np.flatnonzero(self.page):
            cache[self.page[token], 0, :, self.offset[token]] = keys[token].astype(cache.dtype)
            cache[self.page[token], 1, :, self.offset[token]] = self.qkv[token, :, -1].astype(cache.dtype)
        return cache

    @property
    def answered(self) -> np.ndarray:
        """Which queries have a defined result."""
        counted = np.repeat(self.lengths > 0, np.diff(self.starts))
        return np.pad(counted, (0, len(self.qkv) - len(counted))) & (self.page > 0)


def make_case(
    rows: Sequence[Row],
    shape: Shape,
    kind: Kind = PLAIN,
    *,
    tokens: int | None = None,
    pages: int | None = None,
    dtype: npt.DTypeLike = jnp.float32,
    seed: int = 0,
) -> Case:
    """`rows` over pages in random order, padded to `tokens` tokens and `pages` columns of the page table."""
    rng = np.random.default_rng(seed)
    lengths = np.array([row.length for row in rows], np.int32)
    starts = np.cumsum([0, *(row.new for row in rows)]).astype(np.int32)
    size = tokens or int(starts[-1])
    owned = -(-lengths // shape.page_size)
    width = pages or int(max(owned))
    total = 1 + len(rows) * width

    cache = np.full(cache_shape(total, shape.heads, shape.page_size, shape.head_dim), UNSEEN, np.float32)
    free = list(rng.permutation(np.arange(1, total)))
    table = np.zeros((len(rows), width), np.int32)
    page, offset, positions = np.zeros((3, size), np.int32)
    keys, values = [], []
    for row, (length, new) in enumerate(rows):
        table[row, : owned[row]] = [free.pop() for _ in range(owned[row])]
        cached = max(length - new, 0)
        entries = rng.normal(size=(2, cached, shape.heads, shape.head_dim)).astype(dtype)
        for position in range(cached):
            cache[table[row, position // shape.page_size], :, :, position % shape.page_size] = entries[:, position]
        keys.append(entries[0].astype(np.float64))
        values.append(entries[1].astype(np.float64))
        for token in range(new if length else 0):
            position, place = cached + token, starts[row] + token
            positions[place] = position
            page[place], offset[place] = table[row, position // shape.page_size], position % shape.page_size

    qkv = rng.normal(size=(size, shape.heads, shape.group + 2, shape.head_dim)).astype(np.float32)
    qkv[page == 0] = UNSEEN
    angles = (positions[:, None] * rng.uniform(0.01, 1, int(shape.head_dim * kind.rotated) // 2)).astype(np.float32)
    sinks = rng.normal(size=(shape.heads, shape.group)).astype(np.float32) * 2
    slopes = rng.uniform(0.01, 0.5, size=(shape.heads, shape.group)).astype(np.float32)
    cached = jnp.asarray(cache, dtype)
    own = sinks, slopes, rng.uniform(-0.5, 0.5, size=(2, shape.head_dim)).astype(np.float32)
    return Case(kind, qkv, cached, page, offset, table, lengths, starts, angles, *own, keys, values)


def check(attend: Attend, case: Case, *, decode: bool = False) -> None:
    out, cache = (np.asarray(array) for array in case.run(attend, decode=decode))
    assert out.shape == (*case.qkv.shape[:2], case.group, case.qkv.shape[3])
    assert out.dtype == case.qkv.dtype
    np.testing.assert_allclose(out[case.answered], case.expected()[case.answered], rtol=2e-5, atol=2e-5)
    assert cache.dtype == case.cache.dtype
    wide, expected = cache.astype(np.float64), case.expected_cache().astype(np.float64)
    rounding = 2**-7 if cache.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(wide[1:], expected[1:], rtol=rounding, atol=1e-5)


# Every group, head_dim and page size that models use, a page that does not divide the block of 128 tokens, and one
# that is larger.
SHAPES = {
    "pages of one": Shape(heads=1, group=1, head_dim=16, page_size=1),
    "64 channels": Shape(heads=2, group=2, head_dim=64, page_size=8),
    "96 channels": Shape(heads=3, group=3, head_dim=96, page_size=32),
    "powers of two": Shape(heads=2, group=4, head_dim=128, page_size=64),
    "80 channels": Shape(heads=1, group=8, head_dim=80, page_size=32),
    "pages of 48": Shape(heads=2, group=5, head_dim=16, page_size=48),
    "large pages": Shape(heads=1, group=7, head_dim=256, page_size=256),
}
SMALL = Shape(heads=2, group=6, head_dim=32, page_size=8)
ROWS, TOKENS, PAGES = 5, 96, 40
"""Rows, tokens of a ragged step and columns of the page table of most cases with the small shape."""

KINDS = {
    "window": Kind(window=20),
    "window of one, sinks": Kind(window=1, sinks=True),
    "chunk": Kind(chunk=24),
    "chunk across blocks, sinks": Kind(chunk=90, soft_cap=1.5, sinks=True, slopes=True),
    "soft cap": Kind(soft_cap=1.5),
    "slopes": Kind(rotated=0, slopes=True),
    "norms": Kind(norms=True),
    "norms alone": Kind(rotated=0, norms=True),
    "all": Kind(soft_cap=1.5, window=40, sinks=True, slopes=True, norms=True, scale=1.3),
}


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention, and what of the suite it is checked with.

    What needs a GPU is the compiled kernels; elsewhere they are interpreted.
    """

    attend: Attend
    shapes: Iterable[str] = tuple(SHAPES)
    kinds: Iterable[str] = tuple(KINDS)
    needs_gpu: bool = False


IMPLEMENTATIONS = {
    "xla": Implementation(
        partial(append_and_attend, implementation="xla"), ("pages of one", "pages of 48", "large pages")
    ),
    "kernels": Implementation(
        by_kernels(DecodeConfig(32, 1, 256, 4, 2), RaggedConfig(16, 32, 4, 2)),
        ("pages of one", "powers of two", "80 channels", "pages of 48", "large pages"),
    ),
    "kernels, split": Implementation(
        by_kernels(DecodeConfig(16, 4, 32, 4, 2), RaggedConfig(4, 64, 4, 2)),
        ("80 channels",),
        ("window of one, sinks", "chunk", "chunk across blocks, sinks", "all"),
    ),
    "gpu": Implementation(append_and_attend, needs_gpu=True),
    "gpu, long contexts": Implementation(compiled_as_for_long_contexts, needs_gpu=True),
}


def marked(name: str, *values: Any) -> Any:
    marks = [pytest.mark.gpu] if IMPLEMENTATIONS[name].needs_gpu else []
    return pytest.param(name, *values, marks=marks, id="-".join([name, *map(str, values)]))


@cache
def compiled(name: str) -> Attend:
    """An implementation, compiled once for all calls of equal shapes; its products of float32 are not in tf32."""
    run = jax.jit(IMPLEMENTATIONS[name].attend, static_argnames="scoring")
    return jax.default_matmul_precision("highest")(run)


@pytest.fixture(scope="module", params=[marked(name) for name in IMPLEMENTATIONS])
def attend(request: pytest.FixtureRequest) -> Attend:
    return compiled(request.param)


def each_of(field: str) -> pytest.MarkDecorator:
    """Every implementation with each of its own shapes or kinds, as the arguments `attend` and `name`."""
    cases = [marked(key, name) for key, one in IMPLEMENTATIONS.items() for name in getattr(one, field)]
    return pytest.mark.parametrize(("attend", "name"), cases, indirect=["attend"])


def small_case(rows: Sequence[Row], kind: Kind = PLAIN, *, tokens: int | None = None, **options: Any) -> Case:
    """`rows` with the small shape, padded as most cases with it are: `tokens` is None for decoding."""
    return make_case([*rows, *[NO_ROW] * (ROWS - len(rows))], SMALL, kind, tokens=tokens, pages=PAGES, **options)


def without_last(case: Case, row: int) -> Case:
    """The same, where the last token of a row has no page, and is no number."""
    page, qkv, last = case.page.copy(), case.qkv.copy(), case.starts[row + 1] - 1
    page[last], qkv[last] = 0, UNSEEN
    return replace(case, page=page, qkv=qkv)


def narrow_case(dtype: npt.DTypeLike, decode: bool) -> Case:
    """Heads that are not rotated, in a cache of a narrow dtype."""
    kind = Kind(rotated=0.0)
    if decode:
        return small_case([Row(141), Row(4), Row(100), Row(1), Row(40)], kind, dtype=dtype)
    return small_case([chunk(90, 45), chunk(0, 3), chunk(17, 1)], kind, tokens=TOKENS, dtype=dtype)


@each_of("shapes")
@pytest.mark.slow
def test_decoding_over_contexts_of_every_length(attend: Attend, name: str) -> None:
    """Contexts on both sides of the borders of a page and of a block, with padding rows between them."""
    rows = [Row(length) for length in (1, 127, 0, 128, 129, 300, 32, 33, 0)]
    check(attend, make_case(rows, SHAPES[name]), decode=True)


SEVERAL = 3
"""New tokens of a row where each has several."""


@pytest.mark.parametrize(
    "kind",
    [Kind(), pytest.param(Kind(window=2, sinks=True), marks=pytest.mark.slow), Kind(chunk=33), KINDS["all"]],
    ids=["plain", "near", "next chunk", "all"],
)
def test_decoding_several_tokens_of_each_row(attend: Attend, kind: Kind) -> None:
    """Contexts on both sides of the borders of a block, a row of new tokens alone, padding, and a token to drop."""
    rows = [Row(length, SEVERAL) for length in (141, 3, 0, 34, 131)]
    check(attend, without_last(make_case(rows, SMALL, kind, pages=PAGES), 4), decode=True)


@each_of("shapes")
def test_chunks_of_every_size_in_one_batch(attend: Attend, name: str) -> None:
    """First chunks and chunks behind a cached prefix, below, at and above the tile of 32; decoding rows; padding."""
    sizes = [(0, 1), (0, 33), (130, 1), (64, 32), (0, 0), (100, 29), (0, 5), (127, 70), (255, 1), (0, 0)]
    rows = [chunk(*size) for size in sizes]
    check(attend, make_case(rows, SHAPES[name], tokens=sum(new for _, new in sizes) + 19))


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
@each_of("kinds")
@pytest.mark.slow
def test_every_kind_of_attention(attend: Attend, name: str, decode: bool) -> None:
    if decode:
        case = small_case([Row(141), Row(4), Row(0), Row(1), Row(90)], KINDS[name])
    else:
        case = small_case([chunk(90, 45), chunk(0, 3), chunk(17, 1)], KINDS[name], tokens=TOKENS)
    check(attend, case, decode=decode)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
@pytest.mark.parametrize("kind", [Kind(window=20), Kind(chunk=24)], ids=["window", "chunk"])
def test_pages_that_were_given_back_are_not_looked_at(attend: Attend, kind: Kind, decode: bool) -> None:
    """The page of padding stands for them, which may hold no numbers."""
    rows = [Row(141), Row(60), Row(0), Row(1), Row(95)] if decode else [chunk(90, 45), chunk(0, 3), chunk(50, 1)]
    case = small_case(rows, kind, tokens=None if decode else TOKENS)
    table = case.page_table.copy()
    for row, (length, new) in enumerate(rows):
        first = length - new
        seen = first - 19 if kind.window else first - first % 24
        table[row, : max(0, seen) // SMALL.page_size] = 0
    check(attend, replace(case, page_table=table), decode=decode)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.slow
def test_a_narrow_cache_is_written_and_read_in_its_own_precision(
    attend: Attend, dtype: npt.DTypeLike, decode: bool
) -> None:
    check(attend, narrow_case(dtype, decode), decode=decode)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
@pytest.mark.slow
def test_bfloat16_throughout_is_as_exact_as_bfloat16_is(attend: Attend, decode: bool) -> None:
    case = narrow_case(jnp.bfloat16, decode)
    case = replace(case, qkv=case.qkv.astype(jnp.bfloat16))
    out, _ = case.run(attend, decode=decode)
    assert out.dtype == jnp.bfloat16
    expected = case.expected()[case.answered]
    error = np.asarray(out, np.float64)[case.answered] - expected
    assert np.linalg.norm(error) < 2**-7 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["kernels", "kernels, split"])
def test_the_ragged_kernel_reads_nothing_for_padding(name: str) -> None:
    """Zeros are what a softmax over no key leaves."""
    case = small_case([chunk(20, 4), Row(0, 3), chunk(0, 2)], tokens=TOKENS)
    out, _ = case.run(IMPLEMENTATIONS[name].attend, decode=False)
    assert not np.asarray(out)[4:7].any()
    assert not np.asarray(out)[9:].any()


def test_tokens_of_a_row_without_length_disturb_nobody(attend: Attend) -> None:
    """A sequence that ended on the device stays in the batches that were planned before, tokens and all."""
    check(attend, small_case([chunk(20, 4), Row(0, 1), Row(51), Row(0, 40), chunk(0, 2)], tokens=TOKENS))


@hypothesis_settings(max_examples=15)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 70)), min_size=1, max_size=ROWS),
    seed=st.integers(0, 99),
)
def test_any_mixture_of_chunks(attend: Attend, sizes: list[tuple[int, int]], seed: int) -> None:
    rows: list[Row] = []
    for cached, wanted in sizes:
        new = min(wanted, TOKENS - sum(row.new for row in rows))
        rows.append(chunk(cached, new) if new else NO_ROW)
    check(attend, small_case(rows, tokens=TOKENS, seed=seed))


@hypothesis_settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 320), min_size=ROWS, max_size=ROWS), seed=st.integers(0, 99))
def test_any_mixture_of_decoding_rows(attend: Attend, lengths: list[int], seed: int) -> None:
    check(attend, small_case([Row(length) for length in lengths], seed=seed), decode=True)


def test_one_token_after_another_sees_what_the_ones_before_wrote(attend: Attend) -> None:
    """Sequences computed in one chunk and token by token give the same attention and the same cache."""
    cached, new = np.array([0, 9, 31]), 6
    whole = small_case([chunk(before, new) for before in cached], tokens=TOKENS)
    expected, _ = whole.run(attend, decode=False)
    cache = whole.cache
    for step in range(new):
        tokens = np.pad(whole.starts[:3] + step, (0, ROWS - 3), constant_values=TOKENS - 1)
        one = replace(
            whole, qkv=whole.qkv[tokens], cache=cache, page=whole.page[tokens], offset=whole.offset[tokens],
            lengths=np.pad(cached + step + 1, (0, ROWS - 3)).astype(np.int32), angles=whole.angles[tokens],
        )  # fmt: skip
        out, cache = one.run(attend, decode=True)
        np.testing.assert_allclose(out[:3], expected[tokens[:3]], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(np.asarray(cache)[1:], whole.expected_cache()[1:], rtol=1e-5, atol=1e-5)


PARTLY_ROTATED = Kind(rotated=0.25, norms=True)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
@pytest.mark.parametrize("name", ["xla", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_only_the_first_channels_of_a_head_are_rotated(name: str, decode: bool) -> None:
    rows = [Row(41), Row(4), Row(0), Row(1), Row(90)] if decode else [chunk(20, 9), chunk(0, 3)]
    check(compiled(name), small_case(rows, PARTLY_ROTATED, tokens=None if decode else TOKENS), decode=decode)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
def test_a_gpu_rotates_some_channels_before_its_kernels(decode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that it would choose, interpreted."""
    for module, name in ((pallas_decode, "decode_attention"), (pallas_ragged, "ragged_attention")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))
    rows = [Row(41), Row(4), Row(0), Row(1), Row(90)] if decode else [chunk(20, 9), chunk(0, 3)]
    case = small_case(rows, PARTLY_ROTATED, tokens=None if decode else TOKENS)
    on_gpu = partial(append_and_attend, platform=Platform("gpu"))
    check(jax.jit(on_gpu, static_argnames="scoring"), case, decode=decode)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
def test_heads_that_are_too_large_for_kernels_are_left_to_xla(decode: bool) -> None:
    """No kernel is lowered: this would fail here, where there is no GPU."""
    rows = [Row(41), Row(4)] if decode else [chunk(20, 9), chunk(0, 3)]
    case = make_case(rows, Shape(2, 1, 264, 4), KINDS["norms"], tokens=None if decode else TOKENS)
    on_gpu = partial(append_and_attend, platform=Platform("gpu"))
    check(jax.jit(on_gpu, static_argnames="scoring"), case, decode=decode)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "ragged"])
def test_normalised_keys_are_rounded_before_they_are_rotated(decode: bool) -> None:
    """The kernels write what XLA writes, which rounds to bfloat16 twice."""
    rows = [Row(41), Row(4), Row(9), Row(1), Row(90)] if decode else [chunk(20, 9), chunk(0, 3)]
    case = small_case(rows, tokens=None if decode else TOKENS)
    qkv, weights = jnp.asarray(case.qkv, jnp.bfloat16), case.norm_weights.astype(jnp.bfloat16)
    options = {
        "scoring": PLAIN.scoring, "rotation": Rotation(jnp.cos(case.angles), jnp.sin(case.angles)),
        "norms": HeadNorms(*(Norm(jnp.asarray(weight), **NORM) for weight in weights)),
    }  # fmt: skip
    arrays = jax.tree.map(jnp.asarray, (qkv, case.cache.astype(jnp.bfloat16), case.locations(decode=decode)))
    kernels = by_kernels(DecodeConfig(32, 1, 256, 4, 2), RaggedConfig(16, 32, 4, 2))
    _, found = jax.jit(partial(kernels, sinks=None, slopes=None, **options))(*arrays)
    _, expected = jax.jit(partial(append_and_attend, implementation="xla", **options))(*arrays)
    np.testing.assert_array_equal(*(np.asarray(each, np.float32)[1:] for each in (found, expected)))


def test_pages_are_for_causal_attention() -> None:
    case = small_case([Row(4)])
    with pytest.raises(ValueError, match=r"scoring\.causal is False"):
        append_and_attend(
            jnp.asarray(case.qkv), case.cache, case.locations(decode=True), scoring=Scoring(1.0, causal=False)
        )


def test_rows_of_unequal_tokens_have_starts() -> None:
    case = make_case([Row(4, 2), Row(9, 1)], SMALL)
    with pytest.raises(ValueError, match=r"3 tokens are not equally many of 2 rows: PageLocations\.starts says whose"):
        append_and_attend(jnp.asarray(case.qkv), case.cache, case.locations(decode=True), scoring=Scoring(1.0))


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (1, None), (4, None), (None, 1), (None, 4), (None, 30)])
def test_which_keys_a_query_attends_to(window: int | None, chunk: int | None) -> None:
    scoring, places = Scoring(1.0, window=window, chunk=chunk), jnp.arange(23)
    seen = np.array(
        [
            [key <= query and query - key < (window or 99) and key // (chunk or 99) == query // (chunk or 99)
             for key in range(23)]
            for query in range(23)
        ]
    )  # fmt: skip
    np.testing.assert_array_equal(scoring.visible(places[:, None], places), seen)
    np.testing.assert_array_equal(scoring.first_visible(places), seen.argmax(axis=1))
    assert scoring.first_visible(jnp.array(-3)) == 0, "of a padding row"


@pytest.mark.parametrize("beside", [{"window": 4}, {"causal": False}])
def test_a_chunk_is_causal_and_has_no_window_beside_it(beside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"attention has chunk=8 with window=.*; a chunk has no window beside it"):
        Scoring(1.0, chunk=8, **beside)


HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)


@pytest.mark.parametrize("cached", [None, jnp.float8_e4m3fn], ids=["same cache", "float8 cache"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_kernels_lower_for_a_gpu(head_dim: int, dtype: npt.DTypeLike, cached: npt.DTypeLike) -> None:
    """Triton wants sizes and operations that the interpreter does not insist on."""
    check_lowering(KINDS["all"], head_dim, dtype, cached or dtype)


def test_kernels_for_chunks_lower_for_a_gpu() -> None:
    check_lowering(KINDS["chunk across blocks, sinks"], 128, jnp.bfloat16, jnp.bfloat16)


def check_lowering(kind: Kind, head_dim: int, dtype: npt.DTypeLike, cached: npt.DTypeLike) -> None:
    cases = [
        make_case([chunk(9, new), chunk(40, new)], Shape(2, 4, head_dim, 32), kind, dtype=cached)
        for new in (1, SEVERAL)
    ]
    itemsize = np.dtype(dtype).itemsize
    mesh = AbstractMesh((1,), ("x",), abstract_device=HOPPER, axis_types=(AxisType.Auto,))
    kernels = {
        True: partial(decode_attention, config=tuned.decode_config(2, 2, head_dim, itemsize, 4096)),
        False: partial(ragged_attention, config=tuned.ragged_config(4096, 4, head_dim, itemsize)),
    }
    with jax.sharding.use_abstract_mesh(mesh):
        for case, (decode, kernel) in itertools.product(cases, kernels.items()):
            traced = jax.jit(partial(kernel, scoring=case.kind.scoring)).trace(
                case.qkv.astype(dtype),
                case.cache,
                case.locations(decode=decode),
                norms=HeadNorms(*(Norm(weight.astype(dtype), **NORM) for weight in case.norm_weights)),
                rotation=Rotation(case.angles, case.angles),
                sinks=case.sinks,
                slopes=case.slopes,
            )
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert "triton" in text


ON_HOPPER = {
    "group of 4": Shape(heads=2, group=4, head_dim=128, page_size=32),
    "group of 8": Shape(heads=1, group=8, head_dim=128, page_size=64),
    "group of 1": Shape(heads=3, group=1, head_dim=128, page_size=128),
    "pages of 16": Shape(heads=2, group=2, head_dim=128, page_size=16),
}


def make_bfloat16_case(rows: Sequence[Row], shape: str, kind: Kind = Kind(scale=0.1), *, tokens: int) -> Case:
    case = make_case(rows, ON_HOPPER[shape], kind, tokens=tokens, dtype=jnp.bfloat16)
    return replace(case, qkv=case.qkv.astype(jnp.bfloat16))


def check_on_hopper(case: Case, *, interpret: bool = False) -> None:
    out, cache = case.run(partial(ragged_attention, config=None, interpret=interpret), decode=False)
    # Rows that nobody owns are not written: what lies there may not even be a number.
    got, expected = np.asarray(out)[case.answered].astype(np.float64), case.expected()[case.answered]
    assert np.linalg.norm(got - expected) < 6e-3 * np.linalg.norm(expected)
    np.testing.assert_allclose(got, expected, atol=0.05)
    written, kept = np.asarray(cache, np.float64)[1:], case.expected_cache().astype(np.float64)[1:]
    # Normalised keys are rounded before they are rotated, which may leave a small difference of large channels.
    atol = 2**-7 * np.nanmax(np.abs(kept)) if case.kind.norms else 1e-5
    np.testing.assert_allclose(written, kept, rtol=2**-7, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize(("rotated", "norms"), [(1.0, False), (0.0, False), (1.0, True)])
@pytest.mark.parametrize("shape", ON_HOPPER)
def test_prompts_by_the_kernel_for_hopper(shape: str, rotated: float, norms: bool) -> None:
    """More tiles than multiprocessors, rows that end inside a tile, in a block, at its end, and none at all."""
    rows = [chunk(0, 512), chunk(100, 33), Row(77), NO_ROW, Row(0, 40), chunk(0, 128), chunk(0, 5), chunk(3000, 300)]
    check_on_hopper(make_bfloat16_case(rows, shape, Kind(rotated=rotated, norms=norms, scale=0.1), tokens=1100))


class Accumulator:
    """What products are added to, in place of the registers: the interpreter knows no operand that lies in some."""

    def __init__(self, shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
        self.value = jnp.zeros(shape, dtype)

    @classmethod
    def init(cls, value: jax.Array) -> Accumulator:
        accumulator = cls(value.shape, value.dtype)
        accumulator.value = value
        return accumulator

    def __getitem__(self, index: Any) -> jax.Array:
        return self.value[index]

    def add_product(self, left: jax.Array, right_ref: Any) -> None:
        self.value += jnp.dot(left, right_ref[...], preferred_element_type=self.value.dtype)

    def state_after(self, body: Callable[[Accumulator], None]) -> jax.Array:
        body(self)
        return self.value


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this jax has no interpreter for Mosaic GPU")
@pytest.mark.parametrize(("shape", "norms"), [("group of 4", False), ("pages of 16", True)])
def test_the_kernel_for_hopper_interpreted(shape: str, norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four programs walk over all tiles; the interpreter looks for races, those of cleared values too."""
    careful = plgpu.InterpretGPUParams(
        detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="nan"
    )
    run_scoped = pl.run_scoped
    monkeypatch.setattr(plgpu, "WGMMAAccumulatorRef", Accumulator)
    monkeypatch.setattr(plgpu, "wgmma", Accumulator.add_product)
    monkeypatch.setattr(pl, "run_state", lambda body: lambda accumulator: accumulator.state_after(body))
    monkeypatch.setattr(
        pl,
        "run_scoped",
        lambda body, *scratch, **options: (
            body(*scratch) if isinstance(scratch[0], Accumulator) else run_scoped(body, *scratch, **options)
        ),
    )
    monkeypatch.setattr(mosaic_hopper, "MULTIPROCESSORS", 4)
    monkeypatch.setattr(mosaic_hopper, "attend", partial(mosaic_hopper.attend, interpret=careful))
    rows = [chunk(0, 70), Row(77), NO_ROW, Row(0, 20), chunk(100, 33), chunk(0, 128)]
    kind = Kind(norms=norms, scale=0.1)
    check_on_hopper(make_bfloat16_case(rows, shape, kind, tokens=260), interpret=True)


@pytest.mark.parametrize("shape", ON_HOPPER)
def test_the_kernel_for_hopper_lowers(shape: str) -> None:
    """Lowering refuses what the interpreter forgives."""
    case = make_case([chunk(9, 1), chunk(40, 1)], ON_HOPPER[shape], dtype=jnp.bfloat16)
    arrays = (case.qkv.astype(jnp.bfloat16), case.cache, case.locations(decode=False))
    run = jax.jit(
        partial(ragged_attention, scoring=case.kind.scoring, norms=None, sinks=None, slopes=None, config=None)
    )
    mesh = AbstractMesh((1,), ("x",), abstract_device=HOPPER, axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = run.trace(*arrays, rotation=Rotation(case.angles, case.angles))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Kind(window=5), Shape(2, 4, 128, 32)),
        (Kind(chunk=5), Shape(2, 4, 128, 32)),
        (Kind(soft_cap=3.0), Shape(2, 4, 128, 32)),
        (Kind(sinks=True), Shape(2, 4, 128, 32)),
        (Kind(slopes=True), Shape(2, 4, 128, 32)),
        (PLAIN, Shape(2, 4, 64, 32)),
        (PLAIN, Shape(2, 3, 128, 32)),
        (PLAIN, Shape(2, 4, 128, 48)),
    ],
)
def test_the_kernel_for_hopper_leaves_other_attention_to_triton(kind: Kind, shape: Shape) -> None:
    case = make_case([chunk(9, 1)], shape, kind, dtype=jnp.bfloat16)
    qkv = jnp.asarray(case.qkv, jnp.bfloat16)
    sinks = jnp.asarray(case.sinks) if kind.sinks else None
    slopes = jnp.asarray(case.slopes) if kind.slopes else None
    assert not mosaic_hopper.takes(qkv, case.cache, kind.scoring, sinks, slopes)
    assert not mosaic_hopper.takes(jnp.asarray(case.qkv), case.cache, PLAIN.scoring, None, None)
