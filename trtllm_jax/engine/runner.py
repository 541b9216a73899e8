"""The device's side of the engine: owns what stays on the devices, and runs dispatches over it."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from trtllm_jax.engine import weights
from trtllm_jax.engine.dispatch import Dispatch
from trtllm_jax.engine.penalties import Penalties
from trtllm_jax.engine.program_table import AXES, REGISTERS, RESULTS, HostArray
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.row_state import RowState

Results = Mapping[str, jax.Array]
"""What dispatches report, by name, on its way to the host."""


class Runner:
    """Runs dispatches on the devices, in order, without waiting for them.

    Args:
        programs: compiled already, or compiled when they are asked for.
        params: the weights, on the devices; others like them may take their place between two steps.
        caches: every layer's cache, on the devices; donated from step to step.
    """

    def __init__(self, programs: Programs, params: Any, caches: tuple[Any, ...]) -> None:
        self._programs = programs
        self._defaults: dict[tuple[str, HostArray], jax.Array] = {}
        """On the devices, in the place of what the host does not send."""
        self._unread: dict[int, jax.Array] = {}
        """Reported, and on their way to the host, by their identity."""
        sizes = programs.sizes
        slots = sizes.limits.max_batch_size
        empty: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "state": (RowState.empty, (slots, sizes.table_widths)),
            "penalties": (Penalties.empty, (slots, programs.vocab, sizes.limits.max_seq_len)),
        }
        read = {name for program in programs.table.values() for name in program.reads}
        self._registers: dict[str, Any] = {"params": params, "caches": caches}
        for name, (make, sized) in empty.items():
            if name in read:
                of_size = jax.jit(make, static_argnums=tuple(range(len(sized))), out_shardings=self._placed(name))
                self._registers[name] = of_size(*sized)

    @property
    def params(self) -> Any:
        """The weights that the next step reads."""
        return self._registers["params"]

    @params.setter
    def params(self, params: Any) -> None:
        self._registers["params"] = params

    def compile_rest(self) -> None:
        """Return when every program is compiled."""
        self._programs.compile_rest()

    def run(self, dispatches: Iterable[Dispatch]) -> Results:
        """Start programs, in order; what they report is on its way to the host."""
        results: dict[str, jax.Array] = {}
        for dispatch in dispatches:
            program = self._programs.table[dispatch.key]
            arguments = [self._registers[name] for name in program.reads]
            for name, wanted in program.inputs.items():
                given = dispatch.inputs.get(name)
                arguments.append(self._default(name, wanted) if given is None else given)
            outputs = self._programs[dispatch.key](*arguments)
            for name, output in zip(program.outputs, outputs if len(program.outputs) > 1 else (outputs,), strict=True):
                if name in REGISTERS:
                    self._registers[name] = output
                if name in RESULTS:
                    results[name] = output
                    self._unread[id(output)] = output
                    output.copy_to_host_async()
        return results

    def read(self, results: Results) -> dict[str, np.ndarray]:
        """What was reported, on the host; waits for the device."""
        arrays = {name: np.asarray(array) for name, array in results.items()}
        for array in results.values():
            self._unread.pop(id(array), None)
        return arrays

    def fitted(self, params: Any, *, copy: bool) -> Any:
        """Other weights in the place of the first, as `weights.fitted` says."""
        return weights.fitted(params, self._programs.params, copy=copy)

    def with_cause(self, failure: BaseException) -> BaseException:
        """The failure of a step, or if weights that it read are gone, an error that says so and what to do."""
        gone = weights.deleted(self.params)
        if not gone:
            return failure
        error = RuntimeError(
            f"{len(gone)} of the engine's weights were deleted, {gone[0]!r} first: a program took them by donation; "
            "give the engine its own with llm.update_weights(params, copy=True), or do not donate while requests run"
        )
        error.__cause__ = failure
        return error

    def close(self) -> None:
        """Wait for what is on its way, which calls back into Python, and free what is on the devices."""
        for array in self._unread.values():
            with contextlib.suppress(Exception):  # the failure of a step was reported already
                np.asarray(array)
        self._unread.clear()
        self._programs.close()
        # The weights may be their owner's too.
        self._registers.pop("params")
        for array in jax.tree.leaves((self._registers, self._defaults)):
            array.delete()
        self._registers = {"params": None}

    def _default(self, name: str, wanted: HostArray) -> jax.Array:
        if (name, wanted) not in self._defaults:
            array = np.full(wanted.shape, wanted.fill, wanted.dtype)
            self._defaults[name, wanted] = jax.device_put(array, self._placed(name))
        return self._defaults[name, wanted]

    def _placed(self, name: str) -> NamedSharding:
        return self._programs.rules.sharding(AXES[name])
