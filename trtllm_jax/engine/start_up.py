"""What an engine's start chose, and how long it took."""

from typing import NamedTuple

from trtllm_jax.engine.limits import SchedulerLimits


class StartUp(NamedTuple):
    """For the start-up line.

    Attributes:
        limits: of one step.
        described: cache and steps in words.
        compile_seconds: for sizing the cache and compiling what the first request needs.
    """

    limits: SchedulerLimits
    described: str
    compile_seconds: float
