"""How large the largest step and the KV cache were at an earlier start, kept beside the compiled programs."""

import contextlib
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

import pallas_kernels
import sharding
from trtllm_jax import common, engine, models, nn
from trtllm_jax.engine import compilation_cache

TOLERANCE = 0.05
"""How much larger the cache may be that fits now, before the one of the record is given up for it."""


class Sizing(NamedTuple):
    """What an engine's start found.

    Attributes:
        temporary_bytes: device memory that the largest step takes beside weights and caches.
        columns: of the KV cache, as `kv_cache.pool_columns` counts them.
    """

    temporary_bytes: int
    columns: int

    def columns_that_fit(self, fitting: int) -> int:
        """`fitting`, or the record's columns if they fit and are nearly as many: programs were compiled for those."""
        return self.columns if self.columns <= fitting <= self.columns * (1 + TOLERANCE) else fitting


def key_of(*facts: Any) -> str:
    """A name for a start with these facts, on this kind of device, with these versions of JAX and of our own code."""
    devices = jax.devices()
    settings = os.environ.get("XLA_FLAGS", ""), getattr(jax.config, "jax_default_matmul_precision", None)
    described = [jax.__version__, version("jaxlib"), devices[0].device_kind, len(devices), settings, _sources(), *facts]
    return hashlib.sha256("\n".join(map(repr, described)).encode()).hexdigest()[:32]


def read(key: str) -> Sizing | None:
    """What a start of this name found; None where nothing readable is kept."""
    path = _path(key)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text())
        return Sizing(int(record["temporary_bytes"]), int(record["columns"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(key: str, sizing: Sizing) -> None:
    """Keep what a start found, whole or not at all; a folder that cannot be written costs the next start some time."""
    path = _path(key)
    if path is None:
        return
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(sizing._asdict()))
        unfinished.replace(path)


def _path(key: str) -> Path | None:
    folder = compilation_cache.folder()
    return None if folder is None else folder / "trtllm_jax_sizes" / f"{key}.json"


def _sources() -> list[tuple[str, int, int]]:
    """The size and time of every file that programs are made from."""
    folders = [Path(package.__path__[0]) for package in (pallas_kernels, sharding, common, engine, models, nn)]
    files = sorted((folder.parent, path) for folder in folders for path in folder.rglob("*.py"))
    return [
        (str(path.relative_to(beside)), stat.st_size, stat.st_mtime_ns)
        for beside, path in files
        for stat in (path.stat(),)
    ]
