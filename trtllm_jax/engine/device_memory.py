"""How much of a GPU's memory JAX takes, whether a model fits into it, and how much a CPU has."""

import math
import os
from pathlib import Path
from typing import Any

import jax
from jax._src import xla_bridge
from jax.sharding import Mesh

from pallas_kernels.devices import Platform
from trtllm_jax.logger import logger

SHARE = "0.95"
"""Part of a GPU that JAX may take; the rest is for what it allocates outside its pool: CUDA's context, libraries' work
space and recorded graphs."""

SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables that name the part; the second is the older spelling."""


def claim() -> None:
    """Let JAX take `SHARE` of every GPU instead of its own default, three quarters.

    Nothing changes where the user named a share. JAX reads it when it starts: a warning says what to do where it has.
    """
    if any(name in os.environ for name in SETTINGS):
        return
    # No public function reports this, up to jax 0.12: `jax.extend.backend` and `jax.devices` start JAX by asking, and
    # the settings that refuse to change once it runs would have to be changed for a try.
    if not xla_bridge.backends_are_initialized():
        os.environ[SETTINGS[0]] = SHARE
    elif Platform.default().on_gpu:
        logger.warning(
            "JAX was started before trtllm_jax and takes only 75 %% of the GPU's memory, which leaves less for the KV "
            "cache; set %s=%s in the environment, or create the LLM before anything else uses JAX",
            SETTINGS[0], SHARE,
        )  # fmt: skip


def free_bytes(mesh: Mesh) -> int | None:
    """The memory that is free on the fullest device of the mesh; None where no device reports it, as on a CPU.

    Of several processes each sees its own devices only.
    """
    reported = [stats for device in mesh.local_devices if "bytes_limit" in (stats := device.memory_stats() or {})]
    return min((stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in reported), default=None)


def for_steps(mesh: Mesh) -> int:
    """Bytes that steps may take on each device: what is free, or where no device reports it, its share of the host."""
    free = free_bytes(mesh)
    return of_host() // len(mesh.local_devices) if free is None else free


def check_weights(shapes: Any, mesh: Mesh) -> None:
    """MemoryError if weights of these shapes and shardings do not fit the devices; says what would help.

    Where no device reports its memory there is nothing to check.
    """
    free = free_bytes(mesh)
    if free is None:
        return
    needed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )
    if needed > free:
        devices = mesh.size * math.ceil(needed / (0.9 * free)) if free > 0 else math.inf
        split = f"set tensor_parallel_size={devices} or more, " if devices <= jax.device_count() else ""
        raise MemoryError(
            f"the weights need {needed / 2**30:.1f} GiB on each device and {max(free, 0) / 2**30:.1f} GiB are free; "
            f"{split}choose a smaller model, or free what else holds the memory"
        )


def of_host() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such bound: the file then says "max"
        return machine
