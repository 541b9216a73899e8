"""The compiled programs of one engine: built before the first request, one a bucket, none afterwards."""

import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
from trtllm_jax.engine import steps
from trtllm_jax.engine.config import decode_buckets, token_buckets
from trtllm_jax.engine.edit_list import A_ROW, room_for
from trtllm_jax.engine.kv_cache import CACHE_AXES
from trtllm_jax.engine.packing import Layout
from trtllm_jax.engine.request import MAX_LOGPROBS
from trtllm_jax.engine.row_state import RowState
from trtllm_jax.engine.scheduler import SchedulerLimits, pages_a_dispatch
from trtllm_jax.engine.steps import Model
from trtllm_jax.guides import mask_words
from trtllm_jax.layers import activation_dtype

LONG_STEP = 1024
"""Tokens from which on a step's kernels take longer than their launches."""

COPIES_A_CALL = 8
"""Page copies of one call of the copy program."""

Compiled = Callable[..., Any]
Number = TypeVar("Number", int, float)


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
        self._programs: dict[tuple[Hashable, ...], Compiled] = {}

    def rows_of(self, tokens: int) -> int:
        """Rows of the ragged program for a bucket of `tokens`."""
        return min(tokens, self.limits.max_batch_size)

    def ragged_layout(self, tokens: int) -> Layout:
        """What the host packs for the ragged program of a bucket."""
        return steps.ragged_layout(tokens, self.rows_of(tokens), self.table_width)

    def decode_layout(self, rows: int) -> Layout:
        """What the host packs for the decode program of a bucket."""
        return steps.decode_layout(rows, pages_a_dispatch(self.limits.max_decode_steps, self._page_size))

    def ragged(self, tokens: int) -> Compiled:
        """The ragged step of a token bucket."""
        return self._programs["ragged", tokens]

    def decode(self, rows: int, greedy: bool) -> Compiled:
        """The decode loop of a row bucket; the greedy one knows no sampling."""
        return self._programs["decode", rows, greedy]

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
        return size if entries <= room_for(size) else self.size_for(-(-entries // A_ROW))

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

    def compile(self, progress: Callable[[int, int], None]) -> None:
        """Compile every program, several at a time; `progress` is told how many are done of how many."""
        lowering = self._lowerings()
        # Tracing holds the interpreter lock; compiling does not, and uses a core or two a program.
        with ThreadPoolExecutor(max_workers=max(4, min(os.cpu_count() or 1, 16))) as pool:
            try:
                futures = {pool.submit(lower().compile, _options(key)): key for key, lower in lowering.items()}
                for done, future in enumerate(as_completed(futures), start=1):
                    self._programs[futures[future]] = future.result()
                    progress(done, len(futures))
            finally:
                # After an interrupt or a failure only programs that are in the compiler already are waited for.
                pool.shutdown(wait=False, cancel_futures=True)

    def temporary_bytes(self) -> int:
        """Device memory that the largest step needs beside weights, caches and results; compiles that step."""
        tokens = self.token_buckets[-1]
        compiled = self._lower_ragged(tokens).compile(_options(("ragged", tokens)))
        analysis: Any = compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)

    def _lowerings(self) -> dict[tuple[Hashable, ...], Callable[[], jax.stages.Lowered]]:
        lowerings: dict[tuple[Hashable, ...], Callable[[], jax.stages.Lowered]] = {}
        for tokens in self.token_buckets:
            lowerings["ragged", tokens] = partial(self._lower_ragged, tokens)
            rows = self.rows_of(tokens)
            lowerings["logprobs", rows] = partial(self._lower_logprobs, rows)
            lowerings["logits", rows] = partial(self._lower_logits, rows)
            lowerings["embeddings", rows] = partial(self._lower_embeddings, rows)
            lowerings["edited", rows] = partial(self._lower_edited, rows)
            lowerings["draw", rows] = partial(self._lower_draw, rows)
        for rows in self.row_buckets:
            for greedy in (True, False):
                lowerings["decode", rows, greedy] = partial(self._lower_decode, rows, greedy)
        lowerings["copy",] = self._lower_copy
        return lowerings

    def _lower_ragged(self, tokens: int) -> jax.stages.Lowered:
        layout = self.ragged_layout(tokens)
        step = partial(steps.ragged_step, self._model, layout)
        cache = self._cache_specs()
        return self._lower_step(step, layout, (cache, P(), P(), P()))

    def _lower_decode(self, rows: int, greedy: bool) -> jax.stages.Lowered:
        layout = self.decode_layout(rows)
        step = partial(steps.decode_loop, self._model, layout, greedy, self.limits.max_decode_steps)
        return self._lower_step(step, layout, (self._cache_specs(), P(), P()))

    def _lower_step(self, step: Compiled, layout: Layout, out_specs: Any) -> jax.stages.Lowered:
        """A step over (params, caches, state, packed), one device's part each, with caches and state donated."""
        mapped = jax.shard_map(
            step,
            mesh=self._mesh,
            in_specs=(self._param_specs(), self._cache_specs(), P(), P()),
            out_specs=out_specs,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=(1, 2)).lower(
            self.params, self._caches, self._state(), self._array((layout.size,), jnp.int32)
        )

    def _lower_logprobs(self, rows: int) -> jax.stages.Lowered:
        count = min(MAX_LOGPROBS, self._model.config.vocab)
        return self._lower_head(partial(steps.token_logprobs, self._model, count), (rows,), (rows, 2))

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
        more = [self._array(shape, jnp.int32) for shape in shapes]
        specs = (self._param_specs(), *[P()] * (1 + len(more)))
        mapped = jax.shard_map(function, mesh=self._mesh, in_specs=specs, out_specs=P(), check_vma=False)
        dtype = activation_dtype(self.params["embed"].dtype)
        last = self._array((self.limits.max_batch_size, self._model.config.embed), dtype)
        return jax.jit(mapped).lower(self.params, last, *more)

    def _lower_draw(self, rows: int) -> jax.stages.Lowered:
        layout = steps.draw_layout(rows)
        logits = self._array((rows, self._model.config.vocab), jnp.float32)
        mapped = jax.shard_map(
            partial(steps.draw, layout), mesh=self._mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False
        )
        return jax.jit(mapped).lower(logits, self._array((layout.size,), jnp.int32))

    def _lower_copy(self) -> jax.stages.Lowered:
        return jax.jit(steps.copy_pages, donate_argnums=0).lower(
            self._caches, self._array((COPIES_A_CALL, 2), jnp.int32)
        )

    def _param_specs(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding.spec, self.params)

    def _cache_specs(self) -> tuple[P, ...]:
        return (sharding.spec_of(CACHE_AXES),) * len(self._caches)

    def _state(self) -> RowState:
        shapes: RowState = jax.tree.map(
            lambda leaf: self._array(leaf.shape, leaf.dtype),
            jax.eval_shape(partial(RowState.empty, self.limits.max_batch_size, self.table_width)),
        )
        return shapes

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)


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
