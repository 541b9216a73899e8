"""A run under JAX's profiler: the trace is kept, and what the device and the host's threads did is summed up."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_jax.commands.bench.trace import Program, newest_trace, read_programs

TRACE_LIMIT = 1_000_000
"""Events after which the profiler leaves out the rest."""

THREADS = "trtllm_jax-"
"""What the names of an LLM's threads begin with."""


@dataclass(frozen=True)
class Profile:
    """Where the time of one run went.

    Attributes:
        trace: the file; Perfetto and chrome://tracing read it.
        programs: what each compiled program did on the first device, the longest first.
        decode_steps: steps that each row decoded; None where requests differ.
        seconds: wall time of the run, which the profiler lengthens.
        threads: CPU seconds of each of the LLM's threads.
    """

    trace: Path
    programs: list[Program]
    decode_steps: int | None
    seconds: float
    threads: dict[str, float]

    def steps_of(self, program: Program) -> int | None:
        """Decode steps that `program` ran; None where it does something else."""
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
    """The profile of one call of `run`, its trace kept in `folder`.

    Python itself is not traced, which would slow the engine's thread down; its cost is that thread's CPU time.
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
    mine = [thread for thread in threading.enumerate() if thread.name.startswith(THREADS) and thread.ident]
    return {
        thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in mine if thread.ident
    }
