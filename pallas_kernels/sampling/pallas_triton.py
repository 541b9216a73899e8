"""Sampling as a fixed chain of Pallas kernels on Triton, with several programs per row and no decision on the host.

A program reads one part of one row. Each launch writes a partial result per part, and every program of the next launch
adds up those of its row, which takes less time than another launch. The first launch finds the largest logit. Then come
several passes each for top-k and top-p: a pass sums the tokens up to several keys at once and so narrows the row's
bracket by a constant factor. The last launch adds the noise and finds the best token of each part. A program returns at
once if the search of its row is over.

At 64 rows of 128,256 float32 logits a pass reads 33 MB, mostly from the L2 cache, which an H100 does at about 5 TB/s:
6 us. Summing for seven keys takes 27 instructions per token, 7.5 us, so that reading and computing are balanced; 24
bits then take 8 passes. The noise takes 120 instructions per token (32 us); tiles that keep no token skip it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.sampling import keys, xla
from pallas_kernels.sampling.noise import PAIR, gumbel_pair, row_key

INVERSE, COUNT, SHARE, DEEPEST, NOISE_FACTOR = range(5)
"""Columns of the rows' parameters: 1 / temperature, top_k, top_p, the largest depth / temperature that min_p keeps, and
the factor on the noise. That is 0 in a greedy row, which keeps only the likeliest tokens and takes the lowest id."""


@dataclass(frozen=True)
class Tuning:
    """How the work is divided; no field changes which token is sampled, except for keys within 4 of a top-p threshold.

    Attributes:
        top_k_ways: the parts into which a pass divides a bracket of top-k; a power of two.
        top_p_ways: the same for top-p.
        tile: tokens that a program handles at once, a power of two up to `PAIR`.
        warps: warps per program.
        programs: about how many programs a launch has, so that they fill the GPU once.
    """

    top_k_ways: int = 16
    top_p_ways: int = 8
    tile: int = 512
    warps: int = 4
    programs: int = 1056


@dataclass(frozen=True)
class Search:
    """The search for one threshold: the bracket's index, parts per pass, passes, and the width at which it is over."""

    column: int
    ways: int
    passes: int
    settled: int


@dataclass(frozen=True)
class Cut:
    """The division of each of `rows` rows of `vocabulary` logits into `parts` of `groups` times 2 * PAIR tokens."""

    rows: int
    vocabulary: int
    parts: int
    groups: int
    tile: int
    warps: int
    interpret: bool

    @classmethod
    def of(cls, shape: tuple[int, ...], tuning: Tuning, interpret: bool) -> "Cut":
        """The division into as many parts as give about `tuning.programs` programs."""
        rows, vocabulary = shape
        groups = pl.cdiv(vocabulary, 2 * PAIR)
        groups_a_part = pl.cdiv(groups, max(1, min(groups, tuning.programs // rows)))
        parts = pl.cdiv(groups, groups_a_part)
        return cls(rows, vocabulary, parts, groups_a_part, tuning.tile, tuning.warps, interpret)

    @property
    def padded_parts(self) -> int:
        """The number of parts, rounded up to a power of two."""
        return pl.next_power_of_2(self.parts)

    def call(
        self, kernel: Callable[..., None], outputs: Sequence[tuple[tuple[int, ...], Any]], *inputs: jax.Array
    ) -> list[jax.Array]:
        """Run `kernel` for every row and part; `outputs` are its results' shapes, less the axis of rows, and dtypes."""
        return pl.pallas_call(
            partial(kernel, cut=self),
            grid=(self.rows, self.parts),
            out_shape=[jax.ShapeDtypeStruct((self.rows, *shape), dtype) for shape, dtype in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=self.warps, num_stages=2),
            interpret=self.interpret,
        )(*inputs)


_LOG2_E = math.log2(math.e)

Refs = Any
Scalars = list[jax.Array]


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seed: jax.Array,
    position: jax.Array,
    *,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> jax.Array:
    """`pallas_kernels.sampling.sample`."""
    cut = Cut.of(logits.shape, tuning, interpret)
    by_rank = _search(0, tuning.top_k_ways, 31, 1)
    by_mass = _search(1, tuning.top_p_ways, 24, 4)

    inverse = keys.inverse_temperature(temperature)
    noise_factor = (temperature > 0).astype(jnp.float32)
    parameters = jnp.stack([inverse, top_k.astype(jnp.float32), top_p, -jnp.log(min_p), noise_factor], axis=1)
    brackets = keys.brackets(temperature, top_k, top_p, cut.vocabulary)

    (best,) = cut.call(_best_kernel, [((cut.parts,), jnp.float32)], logits)
    sums: list[jax.Array] = []
    before: Search | None = None
    for search in [by_rank] * by_rank.passes + [by_mass] * by_mass.passes:
        brackets, *sums = _narrow(cut, before, search, logits, best, parameters, brackets, *sums)
        before = search
    kernel = partial(_draw_kernel, before=by_mass)
    outputs = [((cut.parts,), jnp.float32), ((cut.parts,), jnp.int32)]
    scores, tokens = cut.call(kernel, outputs, logits, best, parameters, brackets, *sums, seed, position)
    part = xla.greedy(scores)
    return jnp.take_along_axis(tokens, part[:, None], axis=1)[:, 0]


def _search(column: int, ways: int, bits: int, settled: int) -> Search:
    return Search(column, ways, pl.cdiv(bits, ways.bit_length() - 1), settled)


@partial(jax.jit, static_argnames=("cut", "before", "search"))
def _narrow(cut: Cut, before: Search | None, search: Search, *inputs: jax.Array) -> list[jax.Array]:
    """One pass of a search; jitted, so that equal passes are traced and lowered once."""
    kernel = partial(_narrow_kernel, before=before, search=search)
    return cut.call(kernel, [((4,), jnp.int32), ((cut.parts, search.ways), jnp.float32)], *inputs)


def _here() -> tuple[jax.Array, jax.Array]:
    """The row and the part of this program."""
    return pl.program_id(0), pl.program_id(1)


def _tile(logits_ref: Refs, cut: Cut, row: jax.Array, start: jax.Array) -> jax.Array:
    """The tile's logits in float32, minus infinity past the end of the row."""
    inside = start + jnp.arange(cut.tile, dtype=jnp.int32) < cut.vocabulary
    tile = plgpu.load(logits_ref.at[row, pl.ds(start, cut.tile)], mask=inside, other=-jnp.inf)
    return tile.astype(jnp.float32)


def _each_tile(cut: Cut, part: jax.Array, visit: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """`carry = visit(start, carry)` for every tile of this program's part."""
    tokens = cut.groups * 2 * PAIR
    first = part * tokens
    return lax.fori_loop(0, tokens // cut.tile, lambda tile, carry: visit(first + tile * cut.tile, carry), carry)


def _best_kernel(logits_ref: Refs, best_ref: Refs, *, cut: Cut) -> None:
    row, part = _here()

    def visit(start: jax.Array, best: jax.Array) -> jax.Array:
        return jnp.maximum(best, _tile(logits_ref, cut, row, start))

    best_ref[row, part] = jnp.max(_each_tile(cut, part, visit, jnp.full(cut.tile, -jnp.inf, jnp.float32)))


def _row_best(best_ref: Refs, cut: Cut, row: jax.Array) -> jax.Array:
    inside = jnp.arange(cut.padded_parts, dtype=jnp.int32) < cut.parts
    return jnp.max(plgpu.load(best_ref.at[row, pl.ds(0, cut.padded_parts)], mask=inside, other=-jnp.inf))


def _step(low: jax.Array, high: jax.Array, ways: int) -> jax.Array:
    """The width of each of `ways` parts of a bracket."""
    return lax.div(high - low + ways - 1, ways)


def _read_brackets(
    brackets_ref: Refs, sums_ref: Refs | None, parameters_ref: Refs, before: Search | None, cut: Cut, row: jax.Array
) -> Scalars:
    """The row's two brackets after the pass `before`, which wrote `sums_ref`."""
    brackets = [brackets_ref[row, column] for column in range(4)]
    if before is None or sums_ref is None:
        return brackets
    low, high = brackets[2 * before.column : 2 * before.column + 2]
    parts = jnp.arange(cut.padded_parts, dtype=jnp.int32)[:, None]
    ways = jnp.arange(before.ways, dtype=jnp.int32)[None, :]
    mask = jnp.broadcast_to(parts < cut.parts, (cut.padded_parts, before.ways))
    block = sums_ref.at[row, pl.ds(0, cut.padded_parts), pl.ds(0, before.ways)]
    sums = jnp.sum(plgpu.load(block, mask=mask, other=0.0), axis=0, keepdims=True)
    total = jnp.sum(jnp.where(ways == before.ways - 1, sums, 0.0))
    target = parameters_ref[row, COUNT] if before.column == 0 else parameters_ref[row, SHARE] * total
    missed = jnp.sum(jnp.where((ways < before.ways - 1) & (sums < target), 1, 0))
    step = _step(low, high, before.ways)
    narrow_low = low + missed * step
    narrow_high = jnp.minimum(high, narrow_low + step)
    open_ = high - low > before.settled
    brackets[2 * before.column] = jnp.where(open_, narrow_low, low)
    brackets[2 * before.column + 1] = jnp.where(open_, narrow_high, high)
    return brackets


def _narrow_kernel(
    logits_ref: Refs,
    best_ref: Refs,
    parameters_ref: Refs,
    brackets_ref: Refs,
    *refs: Refs,
    before: Search | None,
    search: Search,
    cut: Cut,
) -> None:
    """The part's sum over the tokens with keys up to each inner border of the row's bracket, and over all tokens.

    For top-k it counts the tokens; for top-p it sums the unnormalised probabilities of those that top-k kept.
    """
    *sums_ref, out_brackets_ref, out_sums_ref = refs
    row, part = _here()
    brackets = _read_brackets(brackets_ref, sums_ref[0] if sums_ref else None, parameters_ref, before, cut, row)

    @pl.when(part == 0)
    def _keep_brackets() -> None:
        for column, value in enumerate(brackets):
            out_brackets_ref[row, column] = value

    low, high = brackets[2 * search.column : 2 * search.column + 2]

    @pl.when(high - low > search.settled)
    def _sum() -> None:
        best, last_rank = _row_best(best_ref, cut, row), brackets[1]
        inverse = parameters_ref[row, INVERSE]
        step = _step(low, high, search.ways)

        def visit(start: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            depth = keys.depth(_tile(logits_ref, cut, row, start), best)
            if search.column == 0:
                key, weights = keys.rank_key(depth), jnp.ones(cut.tile, jnp.float32)
            else:
                scaled = depth * inverse
                key = keys.mass_key(scaled)
                weights = jnp.where(keys.rank_key(depth) <= last_rank, jnp.exp2(scaled * -_LOG2_E), 0.0)
            inner = [
                jnp.where(key <= low + border * step, total + weights, total)
                for border, total in enumerate(sums[:-1], start=1)
            ]
            return *inner, sums[-1] + weights

        zeros = jnp.zeros(cut.tile, jnp.float32)
        for border, total in enumerate(_each_tile(cut, part, visit, (zeros,) * search.ways)):
            out_sums_ref[row, part, border] = jnp.sum(total)


def _draw_kernel(
    logits_ref: Refs,
    best_ref: Refs,
    parameters_ref: Refs,
    brackets_ref: Refs,
    sums_ref: Refs,
    seed_ref: Refs,
    position_ref: Refs,
    score_ref: Refs,
    token_ref: Refs,
    *,
    before: Search,
    cut: Cut,
) -> None:
    """The part's best score, noise included, and the lowest token that has it."""
    row, part = _here()
    _, last_rank, _, last_mass = _read_brackets(brackets_ref, sums_ref, parameters_ref, before, cut, row)
    best = _row_best(best_ref, cut, row)
    inverse, deepest, noise_factor = (parameters_ref[row, column] for column in (INVERSE, DEEPEST, NOISE_FACTOR))
    key = row_key(seed_ref[row, 0], seed_ref[row, 1], position_ref[row])
    lanes = jnp.arange(cut.tile, dtype=jnp.int32)

    def score(start: jax.Array) -> jax.Array:
        depth = keys.depth(_tile(logits_ref, cut, row, start), best)
        scaled = depth * inverse
        kept = (keys.rank_key(depth) <= last_rank) & (keys.mass_key(scaled) <= last_mass) & (scaled <= deepest)
        return jnp.where(kept, -scaled, -jnp.inf)

    def visit(index: jax.Array, winner: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Only tokens for which token // PAIR is even: the generator gives the noise of token + PAIR with theirs.
        offset = index * cut.tile
        start = pl.multiple_of(part * cut.groups * 2 * PAIR + offset + (offset & -PAIR), cut.tile)
        scores = score(start), score(start + PAIR)

        def compete(winner: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            best_score, best_token = winner
            tokens = start + lanes
            for bare, noise, apart in zip(scores, gumbel_pair(key, tokens), (0, PAIR), strict=True):
                noisy = bare + noise * noise_factor
                wins = (noisy > best_score) | ((noisy == best_score) & (tokens + apart < best_token))
                best_score = jnp.where(wins, noisy, best_score)
                best_token = jnp.where(wins, tokens + apart, best_token)
            return best_score, best_token

        somebody = jnp.max(jnp.maximum(*scores)) > -jnp.inf
        return lax.cond(somebody, compete, lambda winner: winner, winner)

    nobody = jnp.full(cut.tile, -jnp.inf, jnp.float32), part * cut.groups * 2 * PAIR + lanes
    best_score, best_token = lax.fori_loop(0, cut.groups * PAIR // cut.tile, visit, nobody)
    highest = jnp.max(best_score)
    score_ref[row, part] = highest
    token_ref[row, part] = jnp.min(jnp.where(best_score == highest, best_token, cut.vocabulary - 1))
