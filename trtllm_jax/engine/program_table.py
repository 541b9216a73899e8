"""The table of an engine's programs: what each computes, for which sizes, from what, and when it runs.

Compiling, counting, keys and the documentation follow from `FAMILIES`, without a cache from `ENCODE_FAMILIES`. A
program is a function of registers, which are arrays that stay on the devices from call to call, and of what the host
sends. Its outputs become registers again, or results, which are copied to the host.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.devices import Platform
from trtllm_jax.engine import penalties, steps
from trtllm_jax.engine.config import decode_buckets, encode_rows, encode_widths, extras_buckets, token_buckets
from trtllm_jax.engine.dispatch import Key
from trtllm_jax.engine.encode_step import encode_layout, encode_step
from trtllm_jax.engine.extras import FEW_EXTRAS
from trtllm_jax.engine.grammar import mask_words
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.packing import Layout
from trtllm_jax.engine.steps import Draw
from trtllm_jax.nn.model import Model

COPIES_PER_CALL = 8
"""Page copies of one call of the copy program."""

REGISTERS = {
    "params": "the weights",
    "caches": "every layer's cache",
    "state": "the running sequences (`RowState`)",
    "penalties": "what changes the logits of sequences with penalties (`Penalties`)",
    "last": "the residual stream of the last token of each row of the last ragged step",
    "tokens": "what the last step drew for each row: how many tokens, then these",
    "drawn": "what was drawn last from edited logits: an `Outcome` and a token for each row",
}
"""What stays on the devices from call to call."""

RESULTS = ("tokens", "drawn", "scores", "logits", "embeddings", "sampled")
"""Outputs that are copied to the host."""


AXES: Mapping[str, tuple[str, ...]] = {
    "state": ("slots",),
    "penalties": ("slots",),
    "last": ("slots", "embed"),
    "tokens": ("rows",),
    "drawn": ("rows",),
    "scores": ("steps", "rows"),
    "logits": ("rows",),
    "embeddings": ("rows", "embed"),
    "sampled": ("rows",),
    "packed": ("words",),
    "rows": ("rows",),
    "allowed": ("rows",),
    "pairs": ("pairs",),
}
"""The first logical axes of registers, results and what the host sends, by which the sharding rules place them.

Weights and caches say themselves where they lie.
"""


class HostArray(NamedTuple):
    """What the host sends: a shape, a dtype, and what fills it where nothing is sent; None where it always is."""

    shape: tuple[int, ...]
    dtype: Any = jnp.int32
    fill: int | None = None


@dataclass(frozen=True)
class Program:
    """One program before it is compiled.

    Attributes:
        function: takes the registers `reads`, then the arrays `inputs`, in their order; one device's part of each where
            it is `mapped`.
        inputs: what the host sends.
        reads: names of registers.
        donated: those of them whose memory the outputs take.
        outputs: a register or a result for each output.
        sized: shapes of registers, int32, whose size depends on the variant.
        mapped: whether it runs in `shard_map`; otherwise XLA partitions it.
        layout: how `packed`, one of the inputs, is packed; None where there is no such input.
    """

    function: Callable[..., Any]
    inputs: Mapping[str, HostArray]
    reads: tuple[str, ...] = ()
    donated: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sized: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    mapped: bool = True
    layout: Layout | None = None


@dataclass(frozen=True)
class Sizes:
    """What the programs of one engine are compiled for.

    Attributes:
        model: the pure functions.
        limits: sizes that bound a step.
        page_size: tokens of a page.
        table_widths: for each cache group the pages of a row.
        new_pages: pages that a decode dispatch may add to a row.
    """

    model: Model
    limits: SchedulerLimits
    page_size: int
    table_widths: tuple[int, ...]
    new_pages: int

    @property
    def platform(self) -> Platform:
        """What computes."""
        return self.model.platform

    @property
    def on_cpu(self) -> bool:
        """Whether programs may look at their data to decide what they compute, which makes a GPU's host wait."""
        return self.platform.on_cpu

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """Tokens that ragged steps are compiled for."""
        return token_buckets(self.limits.max_num_tokens, self.platform)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Rows that decode loops without extras are compiled for."""
        return decode_buckets(self.limits.max_batch_size)

    @property
    def extras_buckets(self) -> tuple[int, ...]:
        """Rows that decode loops with extras are compiled for: fewer, where these are programs of their own."""
        return self.row_buckets if self.on_cpu else extras_buckets(self.row_buckets)

    @property
    def decode_iterations(self) -> tuple[int, ...]:
        """Iterations that decode loops are compiled for; one that may look at its data takes the number as an input."""
        most = self.limits.max_decode_steps
        return (1, most) if self.limits.fixed_decode_steps and most > 1 else (most,)

    @property
    def encode_shapes(self) -> tuple[tuple[int, int], ...]:
        """Sequences and tokens of each that steps of whole sequences are compiled for, the smallest first."""
        limits = self.limits
        shapes = [
            (rows, width)
            for width in encode_widths(limits.max_seq_len)
            for rows in encode_rows(limits.rows_of_width(width))
        ]
        return tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape)))

    @property
    def step_rows(self) -> tuple[int, ...]:
        """Rows that the programs after a ragged step are compiled for."""
        return tuple(sorted({self.rows_of(tokens) for tokens in self.token_buckets}))

    def rows_of(self, tokens: int) -> int:
        """Rows of the ragged step for a bucket of tokens."""
        return min(tokens, self.limits.max_batch_size)

    def draw(self, rows: int, greedy: bool, extras: int) -> Draw:
        """How a program of so many rows draws, so many of them with extras, the others greedy or not."""
        return draw_for(self.on_cpu, rows, greedy, extras)


def draw_for(as_many_as_there_are: bool, rows: int, greedy: bool, extras: int) -> Draw:
    """How a program for such rows draws: with room for none, for few or for all rows with extras, if not as needed."""
    if as_many_as_there_are:
        return Draw(False, None)
    if not extras:
        return Draw(not greedy, 0)
    return Draw(True, FEW_EXTRAS if extras <= FEW_EXTRAS < rows else rows)


@dataclass(frozen=True)
class Family:
    """Programs that do the same for different sizes.

    Attributes:
        name: first part of their keys.
        runs: when one of them runs.
        variants: the rest of their keys, for an engine's sizes.
        program: the program of a variant.
    """

    name: str
    runs: str
    variants: Callable[[Sizes], Iterable[tuple[Any, ...]]]
    program: Callable[..., Program]


def programs(sizes: Sizes) -> dict[Key, Program]:
    """Every program that an engine of these sizes may run, by key."""
    families = FAMILIES if sizes.model.cache_groups else ENCODE_FAMILIES
    return {
        (family.name, *variant): family.program(sizes, *variant)
        for family in families
        for variant in dict.fromkeys(family.variants(sizes))
    }


def _packed(layout: Layout) -> dict[str, HostArray]:
    return {"packed": HostArray((layout.size,))}


def _ragged(sizes: Sizes, tokens: int) -> Program:
    layout = steps.ragged_layout(tokens, sizes.rows_of(tokens), sizes.table_widths)
    return Program(
        function=partial(steps.ragged_step, sizes.model, layout, sizes.page_size),
        inputs=_packed(layout),
        reads=("params", "caches", "state"),
        donated=("caches", "state"),
        outputs=("caches", "state", "tokens", "last"),
        layout=layout,
    )


def _decode(sizes: Sizes, rows: int, how: Draw, iterations: int) -> Program:
    layout = steps.decode_layout(rows, sizes.new_pages, len(sizes.table_widths), how)
    what = sizes.model, layout, how, iterations, sizes.page_size
    kept: tuple[str, ...] = ("caches", "state")
    if how.extras == 0:
        loop = partial(steps.decode_loop, *what)
        return Program(loop, _packed(layout), ("params", *kept), kept, (*kept, "tokens"), layout=layout)
    step, kept = partial(steps.decode_loop_with_extras, *what), (*kept, "penalties")
    return Program(step, _packed(layout), ("params", *kept), kept, (*kept, "tokens", "scores"), layout=layout)


def _decode_variants(sizes: Sizes) -> list[tuple[Any, ...]]:
    without = [(rows, sizes.draw(rows, greedy, 0)) for rows in sizes.row_buckets for greedy in (True, False)]
    few_or_all = [(rows, sizes.draw(rows, False, extras)) for rows in sizes.extras_buckets for extras in (1, rows)]
    return [(*variant, iterations) for variant in without + few_or_all for iterations in sizes.decode_iterations]


def _extras(sizes: Sizes, rows: int, room: int | None) -> Program:
    layout = steps.extras_layout(rows)
    return Program(
        function=partial(steps.ragged_extras, sizes.model, layout, room),
        inputs=_packed(layout),
        reads=("params", "state", "penalties", "last", "tokens"),
        donated=("state", "penalties"),
        outputs=("state", "penalties", "scores"),
        sized={"tokens": (rows, 2)},
        layout=layout,
    )


def _extras_variants(sizes: Sizes) -> list[tuple[Any, ...]]:
    return [(rows, sizes.draw(rows, False, extras).extras) for rows in sizes.step_rows for extras in (1, rows)]


def _begin(sizes: Sizes) -> Program:
    layout = penalties.begin_layout(sizes.limits.max_seq_len)
    kept = ("penalties",)
    return Program(partial(penalties.begin, layout), _packed(layout), kept, kept, kept, mapped=False, layout=layout)


def _copy(sizes: Sizes, group: int) -> Program:
    kept, pairs = ("caches",), {"pairs": HostArray((COPIES_PER_CALL, 2))}
    return Program(partial(steps.copy_pages, sizes.model, group), pairs, kept, kept, kept, mapped=False)


def _of_rows(function: Callable[..., Any], result: str) -> Callable[[Sizes, int], Program]:
    def program(sizes: Sizes, rows: int) -> Program:
        of_model = partial(function, sizes.model)
        return Program(of_model, {"rows": HostArray((rows,))}, ("params", "last"), outputs=(result,))

    return program


def _logprobs(sizes: Sizes, rows: int) -> Program:
    return Program(
        function=partial(steps.token_logprobs, sizes.model),
        inputs={"rows": HostArray((rows,))},
        reads=("params", "last", "drawn"),
        outputs=("scores",),
        sized={"drawn": (rows, 2)},
    )


def _edited(sizes: Sizes, rows: int) -> Program:
    layout = steps.edited_layout(rows)
    words = HostArray((rows, mask_words(sizes.model.config.vocab)), fill=-1)
    return Program(
        function=partial(steps.edited_draw, sizes.model, layout),
        inputs={"allowed": words, **_packed(layout)},
        reads=("params", "last"),
        outputs=("drawn",),
        layout=layout,
    )


def _draw(sizes: Sizes, rows: int) -> Program:
    layout = steps.draw_layout(rows)
    logits = HostArray((rows, sizes.model.config.vocab), jnp.float32)
    return Program(
        partial(steps.draw, sizes.platform, layout),
        {"logits": logits, **_packed(layout)},
        outputs=("sampled",),
        layout=layout,
    )


def _encode(sizes: Sizes, rows: int, width: int) -> Program:
    layout = encode_layout(rows, width)
    step = partial(encode_step, sizes.model, layout)
    return Program(step, _packed(layout), ("params",), outputs=("embeddings",), layout=layout)


def _each_step_size(sizes: Sizes) -> list[tuple[Any, ...]]:
    return [(rows,) for rows in sizes.step_rows]


FAMILIES = (
    Family(
        "ragged",
        "a step with prompts, or with a row that needs a token from the host",
        lambda sizes: [(tokens,) for tokens in sizes.token_buckets],
        _ragged,
    ),
    Family("decode", "a step whose rows all decode", _decode_variants, _decode),
    Family("extras", "after a ragged step with penalties or log-probabilities", _extras_variants, _extras),
    Family("begin", "before the first step of a sequence with penalties", lambda sizes: [()], _begin),
    Family(
        "copy",
        "before a step in which a sample forks a page that is full in part",
        lambda sizes: [(group,) for group in range(len(sizes.table_widths))],
        _copy,
    ),
    Family(
        "edited", "after a ragged step whose rows are drawn from logits that the host edits", _each_step_size, _edited
    ),
    Family("logprobs", "after such a draw, where a row reports log-probabilities", _each_step_size, _logprobs),
    Family(
        "logits",
        "after a ragged step whose logits the host needs",
        _each_step_size,
        _of_rows(steps.last_logits, "logits"),
    ),
    Family(
        "embeddings",
        "after a ragged step that ends a prompt whose embedding is reported",
        _each_step_size,
        _of_rows(steps.last_embeddings, "embeddings"),
    ),
    Family("draw", "after users' functions have changed logits on the host", _each_step_size, _draw),
)
"""Every program of an engine with a cache; docs/architecture.md shows this table, and the next."""

ENCODE_FAMILIES = (
    Family("encode", "a step of whole sequences, of a model without a cache", lambda s: s.encode_shapes, _encode),
)
"""Every program of an engine that computes sequences whole."""
