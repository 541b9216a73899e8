"""The time of compiled calls by the device's own clock, from JAX's profiler."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from trtllm_jax.commands.bench.trace import newest_trace, read_kernels

IDLE_US = 1000
"""An idle gap of the device that is longer separates two calls, because the host waits between them."""


def device_microseconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """The time of the kernels of each call, without gaps between them; ValueError if calls cannot be told apart."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for call in calls:
                jax.block_until_ready(call())
                time.sleep(2 * IDLE_US / 1e6)
        kernels = read_kernels(newest_trace(Path(folder)))
    taken: list[float] = []
    end = -math.inf
    for kernel in kernels:
        if kernel.start - end > IDLE_US:
            taken.append(0.0)
        taken[-1] += kernel.self_us
        end = kernel.end
    if len(taken) != len(calls):
        raise ValueError(f"the profiler saw {len(taken)} bursts of kernels for {len(calls)} calls")
    return taken
