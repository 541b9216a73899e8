"""How many pages a GPU's pool has, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from trtllm_jax.engine import kv_cache
from trtllm_jax.engine.kv_cache import CacheSpec, pool_pages
from trtllm_jax.nn.cache_group import CacheGroup

PAGE = 1000
GIB = 1 << 30


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> CacheSpec:
    monkeypatch.setattr(CacheSpec, "page_bytes", lambda self, mesh: PAGE)
    return CacheSpec(CacheGroup((0,), 1, 8), 32, jnp.dtype("bfloat16"))


def gpu(limit: int, used: int = 0) -> Any:
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": used})
    return SimpleNamespace(devices=np.array([device], object), local_devices=[device])


@pytest.mark.parametrize(
    ("limit", "used", "fraction", "temporary", "pages"),
    [
        (2000 * PAGE, 0, 1.0, 0, 2000),
        (2000 * PAGE, 500 * PAGE, 1.0, 0, 1500),
        (2000 * PAGE, 0, 0.5, 0, 1000),
        (2000 * PAGE, 0, 1.0, 700 * PAGE, 1300),
        (2000 * PAGE, 400 * PAGE, 0.5, 300 * PAGE, 500),
        # Many pages are rounded down, so that a little more or less free memory gives the same programs.
        (9000 * PAGE, 0, 1.0, 0, 8192),
        (9000 * PAGE, 700 * PAGE, 1.0, 100 * PAGE, 8192),
        (9000 * PAGE, 0, 1.0, 900 * PAGE, 7168),
    ],
)
def test_a_pool_takes_its_part_of_what_is_free(
    spec: CacheSpec, limit: int, used: int, fraction: float, temporary: int, pages: int
) -> None:
    assert pool_pages(spec, gpu(limit, used), fraction, temporary, None) == pages


def test_what_is_asked_for_must_fit_beside_the_step(spec: CacheSpec) -> None:
    assert pool_pages(spec, gpu(100 * PAGE), 1.0, 50 * PAGE, 49 * 32) == 50
    with pytest.raises(MemoryError, match=f"ask for at most {49 * 32}"):
        pool_pages(spec, gpu(100 * PAGE), 1.0, 50 * PAGE, 49 * 32 + 1)
    with pytest.raises(MemoryError, match="no room for a KV cache"):
        pool_pages(spec, gpu(100 * PAGE), 1.0, 99 * PAGE, None)


def test_a_cpus_pool_does_not_depend_on_the_machine(spec: CacheSpec, cpu_mesh: Mesh) -> None:
    assert pool_pages(spec, cpu_mesh, 0.1, 10 * GIB, None) == kv_cache.CPU_POOL_BYTES // PAGE // 1024 * 1024


@pytest.fixture
def cpu_mesh() -> Any:
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform="cpu")], object))
