"""The compiled programs of one engine: lowered from the table, compiled before they are needed, chosen by size."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sharding import ShardingRules
from trtllm_jax.engine.compiler import Compiled, Compiler
from trtllm_jax.engine.config import Compilation
from trtllm_jax.engine.dispatch import Key, size_of
from trtllm_jax.engine.edit_list import EDITS_PER_ROW, room_for
from trtllm_jax.engine.penalties import Penalties
from trtllm_jax.engine.program_table import AXES, Program, Sizes, programs
from trtllm_jax.engine.row_state import RowState
from trtllm_jax.nn.dtypes import activation_dtype

LONG_STEP = 1024
"""Tokens from which on a step's kernels take longer than their launches."""

Record = TypeVar("Record", RowState, Penalties)


class Programs:
    """Every program that an engine may run, for one model, mesh and set of sizes.

    Args:
        sizes: what they are compiled for.
        mesh: where they run.
        params: the weights, or shapes with shardings like them.
        caches: shapes with shardings of every layer's cache.
    """

    def __init__(self, sizes: Sizes, mesh: Mesh, params: Any, caches: tuple[Any, ...]) -> None:
        self.sizes = sizes
        self.params = params
        self._mesh = mesh
        self.rules = ShardingRules(mesh)
        self._registers: dict[str, Any] = {"params": params, "caches": caches}
        self.table = programs(sizes)
        self._compiler = Compiler({key: partial(self._lower, key) for key in self.table}, self._options)

    def __getitem__(self, key: Key) -> Compiled:
        """A compiled program; waits for it where it is not compiled yet."""
        return self._compiler[key]

    @property
    def vocab(self) -> int:
        """Ids of the model are 0 to vocab - 1."""
        return int(self.sizes.model.config.vocab)

    # ---- which one takes a step ----

    def ragged(self, tokens: int) -> Key:
        """The smallest ragged step for so many tokens that is compiled, or will be first."""
        return self._smallest([("ragged", size) for size in self.sizes.token_buckets if size >= tokens])

    def decode(self, rows: int, greedy: bool, extras: int, steps: int = 1) -> Key:
        """The smallest decode loop for so many rows and iterations that is compiled, or will be first."""
        buckets = self.sizes.extras_buckets if extras else self.sizes.row_buckets
        iterations = next(each for each in self.sizes.decode_iterations if each >= steps)
        return self._smallest(
            [("decode", size, self.sizes.draw(size, greedy, extras), iterations) for size in buckets if size >= rows]
        )

    def encode(self, rows: int, width: int) -> Key:
        """The smallest step for so many whole sequences of so many tokens that is compiled, or will be first."""
        shapes = self.sizes.encode_shapes
        return self._smallest([("encode", *shape) for shape in shapes if shape[0] >= rows and shape[1] >= width])

    def after_step(self, family: str, rows: int) -> Key:
        """The program of a family that takes at least so many rows of a ragged step."""
        return family, bucket_for(rows, self.sizes.step_rows)

    def edited(self, rows: int, entries: int) -> Key:
        """The smallest draw from edited logits for so many rows and entries, of these no more than `edits_at_once`."""
        rows = rows if entries <= room_for(rows) else -(-entries // EDITS_PER_ROW)
        return self.after_step("edited", rows)

    @property
    def edits_at_once(self) -> int:
        """Entries that the largest such draw takes."""
        return room_for(self.sizes.limits.max_batch_size)

    def _smallest(self, keys: Sequence[Key]) -> Key:
        return next((key for key in keys if self._compiler.ready(key)), keys[0])

    # ---- compiling ----

    def compile(self, how: Compilation, progress: Callable[[int, int], None]) -> None:
        """Compile as `how` says; `progress` is called with the number done, and of all that are waited for."""
        keys = list(self.table)
        if how is Compilation.BEFORE:
            self._compiler.compile(keys, progress)
        elif how is Compilation.BESIDE:
            if self.sizes.model.cache_groups:
                smallest = ("ragged", self.sizes.token_buckets[0]), ("decode", self.sizes.row_buckets[0])
                first = [key for key in keys if key[:2] in smallest]
                # Small steps first, then what few ask for.
                keys = sorted(keys, key=lambda key: (key[0] not in ("ragged", "decode"), key[1:2]))
            else:
                first = keys[:1]
            self._compiler.compile(first, progress)
            # One at a time, because steps run beside it.
            self._compiler.start(keys, threads=1)

    def compile_rest(self) -> None:
        """Return when every program is compiled."""
        self._compiler.compile(list(self.table), lambda done, total: None)
        self._compiler.join()

    def close(self) -> None:
        """Compile nothing more."""
        self._compiler.close()

    def temporary_bytes(self) -> int:
        """Device memory that an engine needs beside weights and caches: its state, and what the largest step takes.

        Compiles that step.
        """
        key = ("ragged", self.sizes.token_buckets[-1])
        analysis: Any = self._lower(key).compile(self._options(key)).memory_analysis()
        kept = jax.tree.leaves((self._state(), self._penalties()))
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
        return int(state + analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)

    def largest_array_bytes(self, key: Key) -> int:
        """Bytes on one device of the largest array that a program computes, which is known before it is compiled."""
        return _largest_array_bytes(self._trace(key).jaxpr.jaxpr)

    def _lower(self, key: Key) -> jax.stages.Lowered:
        return self._trace(key).lower()

    def _trace(self, key: Key) -> jax.stages.Traced:
        program = self.table[key]
        registers = [self._register(name, program) for name in program.reads]
        sent = [self._array(name, array.shape, array.dtype) for name, array in program.inputs.items()]
        arguments = (*registers, *sent)
        function = program.function
        if program.mapped:
            in_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments)
            outputs = [self._out_spec(name) for name in program.outputs]
            out_specs = tuple(outputs) if len(outputs) > 1 else outputs[0]
            function = jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        donated = tuple(index for index, name in enumerate(program.reads) if name in program.donated)
        return jax.jit(function, donate_argnums=donated).trace(*arguments)

    def _register(self, name: str, program: Program) -> Any:
        """The shapes of a register as a program reads it."""
        if name in program.sized:
            return self._array(name, program.sized[name], jnp.int32)
        make = {"state": self._state, "penalties": self._penalties, "last": self._last}
        return make[name]() if name in make else self._registers[name]

    def _out_spec(self, name: str) -> Any:
        if name == "caches":
            return jax.tree.map(lambda leaf: leaf.sharding.spec, self._registers[name])
        return self.rules.spec(AXES[name])

    def _last(self) -> jax.ShapeDtypeStruct:
        """The residual stream of each row's last token, as a ragged step leaves it."""
        dtype = activation_dtype(self.sizes.model.weight_dtype(self.params), self.sizes.platform)
        return self._array("last", (self.sizes.limits.max_batch_size, self.sizes.model.config.embed), dtype)

    def _penalties(self) -> Penalties:
        limits = self.sizes.limits
        return self._shapes_of("penalties", Penalties.empty, limits.max_batch_size, self.vocab, limits.max_seq_len)

    def _state(self) -> RowState:
        return self._shapes_of("state", RowState.empty, self.sizes.limits.max_batch_size, self.sizes.table_widths)

    def _shapes_of(self, name: str, make: Callable[..., Record], *sizes: Any) -> Record:
        shapes: Record = jax.tree.map(
            lambda leaf: self._array(name, leaf.shape, leaf.dtype), jax.eval_shape(partial(make, *sizes))
        )
        return shapes

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.rules.sharding(AXES[name]))

    def _options(self, key: Key) -> dict[str, Any] | None:
        """XLA's options for a program.

        A GPU launches a step as one recorded graph, because its kernels may be shorter than their launches. Where they
        are long, recording only delays the first of them, by a millisecond or more.
        """
        if self.sizes.platform.on_gpu and key[0] == "ragged" and size_of(key) >= LONG_STEP:
            return {"xla_gpu_graph_min_graph_size": 1 << 20}
        return None


def _largest_array_bytes(jaxpr: Any) -> int:
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            array = variable.aval
            if hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.number):
                largest = max(largest, array.size * array.dtype.itemsize)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                largest = max(largest, _largest_array_bytes(inner))
    return largest


def bucket_for(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`; the largest one always does, by the scheduler's limits."""
    return int(buckets[np.searchsorted(buckets, size)])
