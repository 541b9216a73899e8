"""The compiled programs of one engine: built before the first request, one a bucket, none afterwards."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trtllm_jax.engine import steps
from trtllm_jax.engine.compiler import Compiled, Compiler, Key
from trtllm_jax.engine.config import Compilation, decode_buckets, extras_buckets, token_buckets
from trtllm_jax.engine.edit_list import EDITS_PER_ROW, room_for
from trtllm_jax.engine.extras import FEW_EXTRAS
from trtllm_jax.engine.grammar import mask_words
from trtllm_jax.engine.packing import Layout
from trtllm_jax.engine.penalties import Penalties, begin, begin_layout
from trtllm_jax.engine.row_state import RowState
from trtllm_jax.engine.scheduler import SchedulerLimits, pages_per_dispatch
from trtllm_jax.engine.steps import Draw
from trtllm_jax.nn.dtypes import activation_dtype
from trtllm_jax.nn.model import Model

LONG_STEP = 1024
"""Tokens from which on a step's kernels take longer than their launches."""

REPLICATED = P()

COPIES_PER_CALL = 8
"""Page copies of one call of the copy program."""

Record = TypeVar("Record", RowState, Penalties)


class Programs:
    """Every program that an engine may dispatch, for one model, mesh and set of limits.

    Args:
        model: the pure functions.
        mesh: where they run.
        params: the weights, or shapes with shardings like them.
        caches: shapes with shardings of every layer's cache.
        limits: sizes that bound a step.
        table_width: pages of a row.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        params: Any,
        caches: tuple[jax.ShapeDtypeStruct, ...],
        limits: SchedulerLimits,
        table_width: int,
    ) -> None:
        self._model = model
        self._mesh = mesh
        self.params = params
        self._caches = caches
        self.limits = limits
        self.table_width = table_width
        self._page_size = caches[0].shape[3]
        self._replicated = NamedSharding(mesh, P())
        self.token_buckets = token_buckets(limits.max_num_tokens)
        self.row_buckets = decode_buckets(limits.max_batch_size)
        self.draws_few_alone = jax.default_backend() == "cpu"
        """Whether a decode loop takes rows that are not greedy as it takes those with extras: one by one.

        A GPU would wait for its host, and samples for all rows in the time of one.
        """
        # Where programs with extras are programs of their own there are fewer of them.
        self._extras_buckets = self.row_buckets if self.draws_few_alone else extras_buckets(self.row_buckets)
        lowerings = self._lowerings()
        self._keys = tuple(lowerings)
        self._programs = Compiler(lowerings, _options)

    def rows_of(self, tokens: int) -> int:
        """Rows of the ragged program for a bucket of `tokens`."""
        return min(tokens, self.limits.max_batch_size)

    def ragged_layout(self, tokens: int) -> Layout:
        """What the host packs for the ragged program of a bucket."""
        return steps.ragged_layout(tokens, self.rows_of(tokens), self.table_width)

    def ragged(self, tokens: int) -> Compiled:
        """The ragged step of a token bucket."""
        return self._programs["ragged", tokens]

    def token_bucket(self, tokens: int) -> int:
        """The tokens of the smallest ragged program for so many that is compiled, or will be first."""
        sizes = [size for size in self.token_buckets if size >= tokens]
        return next((size for size in sizes if self._programs.ready(("ragged", size))), sizes[0])

    def row_bucket(self, rows: int, greedy: bool, extras: int) -> int:
        """The rows of the smallest decode program for so many that is compiled, or will be first."""
        sizes = [size for size in (self._extras_buckets if extras else self.row_buckets) if size >= rows]
        for size in sizes:
            if self._programs.ready(("decode", size, self._draw(size, greedy, extras))):
                return size
        return sizes[0]

    def decode(self, rows: int, greedy: bool, extras: int) -> tuple[Layout, Compiled, bool]:
        """The decode loop of a row bucket for so many rows with extras, all of them greedy or not.

        With what the host packs for it, and whether it has room for extras, and so takes the penalties.
        """
        how = self._draw(rows, greedy, extras)
        return self._decode_layout(rows, how), self._programs["decode", rows, how], how.extras != 0

    def _decode_layout(self, rows: int, how: Draw) -> Layout:
        return steps.decode_layout(rows, pages_per_dispatch(self.limits.max_decode_steps, self._page_size), how)

    def extras(self, rows: int, extras: int) -> Compiled:
        """The draws of so many rows with extras, after a ragged step of `rows` rows."""
        return self._programs["extras", rows, self._draw(rows, False, extras).extras]

    def begin(self) -> tuple[Layout, Compiled]:
        """What the device is told of a sequence with penalties, and what the host packs for it."""
        return begin_layout(self.limits.max_seq_len), self._programs["begin",]

    def _draw(self, rows: int, greedy: bool, extras: int) -> Draw:
        return draw_for(self.draws_few_alone, rows, greedy, extras)

    def _draws(self) -> list[tuple[int, Draw]]:
        """The rows of every decode program, and how it draws."""
        without = [(rows, self._draw(rows, greedy, 0)) for rows in self.row_buckets for greedy in (True, False)]
        few_or_all = [(rows, self._draw(rows, False, extras)) for rows in self._extras_buckets for extras in (1, rows)]
        return list(dict.fromkeys(without + few_or_all))

    def size_for(self, rows: int) -> int:
        """How many rows the programs after a ragged step take for at least `rows` of its rows."""
        return bucket_for(rows, tuple(sorted({self.rows_of(tokens) for tokens in self.token_buckets})))

    def logprobs(self, size: int) -> Compiled:
        """Log-probabilities of what some rows of a ragged step drew."""
        return self._programs["logprobs", size]

    def logits(self, size: int) -> Compiled:
        """The logits of some rows of a ragged step, for the host."""
        return self._programs["logits", size]

    def embeddings(self, size: int) -> Compiled:
        """The embeddings of what ends with some rows of a ragged step."""
        return self._programs["embeddings", size]

    def edited(self, size: int) -> tuple[Layout, Compiled]:
        """The draw from changed logits for some rows of a ragged step, and what the host packs for it."""
        return steps.edited_layout(size), self._programs["edited", size]

    @cached_property
    def mask_words(self) -> int:
        """Words of each row that say which ids such a draw allows."""
        return mask_words(self.vocab)

    @property
    def vocab(self) -> int:
        """Ids of the model are 0 to vocab - 1."""
        return int(self._model.config.vocab)

    def edited_size(self, rows: int, entries: int) -> int:
        """Rows of the smallest such program for so many rows and entries, no more of these than `edits_at_once`."""
        size = self.size_for(rows)
        return size if entries <= room_for(size) else self.size_for(-(-entries // EDITS_PER_ROW))

    @property
    def edits_at_once(self) -> int:
        """Entries that the largest such program takes."""
        return room_for(self.limits.max_batch_size)

    def draw(self, size: int) -> Compiled:
        """The draw from logits that the host changed."""
        return self._programs["draw", size]

    def copy(self) -> Compiled:
        """The page copy."""
        return self._programs["copy",]

    def compile(self, how: Compilation, progress: Callable[[int, int], None]) -> None:
        """Compile as `how` says; `progress` is told how many programs are done of how many are waited for."""
        smallest = ("ragged", self.token_buckets[0]), ("decode", self.row_buckets[0])
        first = [key for key in self._keys if key[:2] in smallest]
        if how is Compilation.BEFORE:
            self._programs.compile(self._keys, progress)
        elif how is Compilation.BESIDE:
            self._programs.compile(first, progress)
            # One at a time, because steps run beside it; small steps first, then what few ask for.
            rest = sorted(self._keys, key=lambda key: (key[0] not in ("ragged", "decode"), key[1:2]))
            self._programs.start(rest, threads=1)

    def compile_rest(self) -> None:
        """Return when every program is compiled."""
        self._programs.compile(self._keys, lambda done, total: None)
        self._programs.join()

    def close(self) -> None:
        """Compile nothing more."""
        self._programs.close()

    def temporary_bytes(self) -> int:
        """Device memory that an engine needs beside weights and caches: its state, and what the largest step takes.

        Compiles that step.
        """
        tokens = self.token_buckets[-1]
        compiled = self._lower_ragged(tokens).compile(_options(("ragged", tokens)))
        analysis: Any = compiled.memory_analysis()
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self._state(), self._penalties())))
        return int(state + analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)

    def _lowerings(self) -> dict[Key, Callable[[], jax.stages.Lowered]]:
        lowerings: dict[Key, Callable[[], jax.stages.Lowered]] = {}
        for tokens in self.token_buckets:
            lowerings["ragged", tokens] = partial(self._lower_ragged, tokens)
            rows = self.rows_of(tokens)
            lowerings["logprobs", rows] = partial(self._lower_logprobs, rows)
            lowerings["logits", rows] = partial(self._lower_logits, rows)
            lowerings["embeddings", rows] = partial(self._lower_embeddings, rows)
            lowerings["edited", rows] = partial(self._lower_edited, rows)
            lowerings["draw", rows] = partial(self._lower_draw, rows)
            for room in {self._draw(rows, False, extras).extras for extras in (1, rows)}:
                lowerings["extras", rows, room] = partial(self._lower_extras, rows, room)
        for rows, how in self._draws():
            lowerings["decode", rows, how] = partial(self._lower_decode, rows, how)
        lowerings["copy",] = self._lower_copy
        lowerings["begin",] = self._lower_begin
        return lowerings

    def _lower_ragged(self, tokens: int) -> jax.stages.Lowered:
        layout = self.ragged_layout(tokens)
        step = partial(steps.ragged_step, self._model, layout)
        arguments = (self._caches, self._state(), self._packed(layout))
        return self._lower(step, arguments, (self._cache_specs(), P(), P(), P()), donated=2)

    def _lower_decode(self, rows: int, how: Draw) -> jax.stages.Lowered:
        layout = self._decode_layout(rows, how)
        step = partial(steps.decode_loop, self._model, layout, how, self.limits.max_decode_steps)
        penalties = None if how.extras == 0 else self._penalties()
        arguments = (self._caches, self._state(), penalties, self._packed(layout))
        return self._lower(step, arguments, (self._cache_specs(), P(), P(), P(), P()), donated=3)

    def _lower_extras(self, rows: int, room: int | None) -> jax.stages.Lowered:
        layout = steps.extras_layout(rows)
        out = self._array((rows, 2), jnp.int32)
        draw = partial(steps.ragged_extras, self._model, layout, room)
        return self._lower(draw, (self._state(), self._penalties(), self._last(), out, self._packed(layout)), donated=2)

    def _lower_begin(self) -> jax.stages.Lowered:
        layout = begin_layout(self.limits.max_seq_len)
        begin_slot = partial(begin, layout)
        return jax.jit(begin_slot, donate_argnums=0).lower(self._penalties(), self._packed(layout))

    def _lower(
        self, function: Compiled, arguments: Any, out_specs: Any = REPLICATED, donated: int = 0
    ) -> jax.stages.Lowered:
        """A function of (params, arguments ...), one device's part each, with the first `donated` arguments donated."""
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, (self.params, *arguments))
        mapped = jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        jitted = jax.jit(mapped, donate_argnums=tuple(range(1, 1 + donated)))
        return jitted.lower(self.params, *arguments)

    def _lower_logprobs(self, rows: int) -> jax.stages.Lowered:
        return self._lower_head(partial(steps.token_logprobs, self._model), (rows,), (rows, 2))

    def _lower_logits(self, rows: int) -> jax.stages.Lowered:
        return self._lower_head(partial(steps.last_logits, self._model), (rows,))

    def _lower_embeddings(self, rows: int) -> jax.stages.Lowered:
        return self._lower_head(partial(steps.last_embeddings, self._model), (rows,))

    def _lower_edited(self, rows: int) -> jax.stages.Lowered:
        layout = steps.edited_layout(rows)
        draw = partial(steps.edited_draw, self._model, layout)
        return self._lower_head(draw, (rows, self.mask_words), (layout.size,))

    def _lower_head(self, function: Compiled, *shapes: tuple[int, ...]) -> jax.stages.Lowered:
        """A function of (params, last rows of a ragged step, int32 of these shapes ...)."""
        return self._lower(function, (self._last(), *[self._array(shape, jnp.int32) for shape in shapes]))

    def _lower_draw(self, rows: int) -> jax.stages.Lowered:
        layout = steps.draw_layout(rows)
        logits = self._array((rows, self.vocab), jnp.float32)
        mapped = jax.shard_map(
            partial(steps.draw, layout), mesh=self._mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False
        )
        return jax.jit(mapped).lower(logits, self._packed(layout))

    def _lower_copy(self) -> jax.stages.Lowered:
        return jax.jit(steps.copy_pages, donate_argnums=0).lower(
            self._caches, self._array((COPIES_PER_CALL, 2), jnp.int32)
        )

    def _cache_specs(self) -> tuple[P, ...]:
        return tuple(cache.sharding.spec for cache in self._caches)

    def _last(self) -> jax.ShapeDtypeStruct:
        """The residual stream of each row's last token, as a ragged step leaves it."""
        dtype = activation_dtype(self._model.weight_dtype(self.params))
        return self._array((self.limits.max_batch_size, self._model.config.embed), dtype)

    def _penalties(self) -> Penalties:
        return self._shapes_of(Penalties.empty, self.limits.max_batch_size, self.vocab, self.limits.max_seq_len)

    def _state(self) -> RowState:
        return self._shapes_of(RowState.empty, self.limits.max_batch_size, self.table_width)

    def _shapes_of(self, make: Callable[..., Record], *sizes: int) -> Record:
        shapes: Record = jax.tree.map(
            lambda leaf: self._array(leaf.shape, leaf.dtype), jax.eval_shape(partial(make, *sizes))
        )
        return shapes

    def _packed(self, layout: Layout) -> jax.ShapeDtypeStruct:
        return self._array((layout.size,), jnp.int32)

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)


def draw_for(as_many_as_there_are: bool, rows: int, greedy: bool, extras: int) -> Draw:
    """How a program for such rows draws: with room for none, for few or for all rows with extras, if not as needed."""
    if as_many_as_there_are:
        return Draw(False, None)
    if not extras:
        return Draw(not greedy, 0)
    return Draw(True, FEW_EXTRAS if extras <= FEW_EXTRAS < rows else rows)


def _options(key: tuple[Any, ...]) -> dict[str, Any] | None:
    """XLA's options for a program.

    A GPU launches a step as one recorded graph, because its kernels may be shorter than their launches. Where they are
    long, recording only delays the first of them, by a millisecond or more.
    """
    if jax.default_backend() == "gpu" and key[0] == "ragged" and key[1] >= LONG_STEP:
        return {"xla_gpu_graph_min_graph_size": 1 << 20}
    return None


def bucket_for(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`; the largest one always does, by the scheduler's limits."""
    return int(buckets[np.searchsorted(buckets, size)])
