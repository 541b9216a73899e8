"""A run under JAX's profiler: keeps the trace, and sums up the times of the device and of the host's threads."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_jax.commands.bench.trace import Program, newest_trace, read_programs

TRACE_LIMIT = 1_000_000
"""The most events that the profiler records; later ones are dropped."""

THREADS = "trtllm_jax-"
"""The prefix of the names of an LLM's threads."""


@dataclass(frozen=True)
class Profile:
    """Where the time of one run went.

    Attributes:
        trace: the file, for Perfetto or chrome://tracing.
        programs: the time of each compiled program on the first device, the longest first.
        decode_steps: decode steps of each row; None if requests differ in length.
        seconds: wall time of the run, including the profiler's overhead.
        threads: CPU seconds of each of the LLM's threads.
    """

    trace: Path
    programs: list[Program]
    decode_steps: int | None
    seconds: float
    threads: dict[str, float]

    def steps_of(self, program: Program) -> int | None:
        """Decode steps that `program` ran; None if it is not a decode program."""
        return self.decode_steps if "decode" in program.name else None

    def record(self) -> dict[str, Any]:
        """Figures, ready for JSON."""
        return {
            "kind": "profile",
            "trace": str(self.trace),
            "seconds": self.seconds,
            "decode_steps": self.decode_steps,
            "host_cpu_seconds": self.threads,
            "programs": [
                {
                    "name": program.name,
                    "total_ms": program.total_ms,
                    "idle_ms": program.idle_ms,
                    "groups_ms": dict(program.groups),
                    "top_kernels": [{"name": name, "ms": ms, "runs": runs} for name, ms, runs in program.top(20)],
                }
                for program in self.programs
            ],
        }


def profile(run: Callable[[], object], folder: Path, *, decode_steps: int | None = None) -> Profile:
    """The profile of one call of `run`, with the trace in `folder`.

    Python is not traced, because that would slow the engine's thread; its cost shows as that thread's CPU time.
    """
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        before, began = _cpu_seconds(), time.perf_counter()
        run()
        seconds, after = time.perf_counter() - began, _cpu_seconds()
    trace = newest_trace(folder)
    threads = {name: after[name] - before.get(name, 0.0) for name in after}
    return Profile(trace, read_programs(trace), decode_steps, seconds, threads)


def _cpu_seconds() -> dict[str, float]:
    """CPU time so far of every thread of an LLM."""
    return {
        thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.name.startswith(THREADS) and thread.ident
    }
