"""How many pages a GPU's pool has, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from sharding import make_mesh
from trtllm_jax.engine import kv_cache
from trtllm_jax.engine.kv_cache import CacheSpec, pool_columns
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
from trtllm_jax.nn.reach import Reach

PAGE = 1000
LIMITS = SchedulerLimits(max_batch_size=4, max_num_tokens=64, max_seq_len=4096, max_decode_steps=1)
GIB = 1 << 30


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> CacheSpec:
    monkeypatch.setattr(CacheSpec, "page_bytes", lambda self, group: PAGE)
    return CacheSpec.of([CacheGroup((0,), KeysAndValues(1, 8))], {}, 32, jnp.dtype("bfloat16"), make_mesh(1))


def columns(spec: CacheSpec, mesh: Any, fraction: float, temporary: int, tokens: int | None) -> int:
    return pool_columns(spec, mesh, LIMITS, fraction, temporary, tokens)


def gpu(limit: int, used: int = 0) -> Any:
    device = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H200", memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": used}
    )
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
    assert columns(spec, gpu(limit, used), fraction, temporary, None) == pages


def test_what_is_asked_for_must_fit_beside_the_step(spec: CacheSpec) -> None:
    assert columns(spec, gpu(100 * PAGE), 1.0, 50 * PAGE, 49 * 32) == 50
    with pytest.raises(MemoryError, match=f"ask for at most {49 * 32}"):
        columns(spec, gpu(100 * PAGE), 1.0, 50 * PAGE, 49 * 32 + 1)
    with pytest.raises(MemoryError, match="no room for a KV cache"):
        columns(spec, gpu(100 * PAGE), 1.0, 99 * PAGE, None)


def test_a_cpus_pool_does_not_depend_on_the_machine(spec: CacheSpec, cpu_mesh: Mesh) -> None:
    assert columns(spec, cpu_mesh, 0.1, 10 * GIB, None) == kv_cache.CPU_POOL_BYTES // PAGE // 1024 * 1024


@pytest.fixture
def cpu_mesh() -> Any:
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform="cpu")], object))


@pytest.mark.parametrize("reach", [Reach(window=32), Reach(chunk=32)], ids=["window", "chunk"])
def test_a_group_of_limited_reach_has_no_more_pages_than_its_sequences_hold(reach: Reach) -> None:
    """Of 4 sequences three pages each of what they see and one of a prompt, and 2 of a step of 64; a padding page."""
    groups = [CacheGroup((0, 2), KeysAndValues(2, 8)), CacheGroup((1,), KeysAndValues(2, 8), reach)]
    spec = CacheSpec.of(groups, {}, 32, jnp.dtype("float32"), make_mesh(1))
    assert spec.pages(3, LIMITS) == (3, 3)
    assert spec.pages(100, LIMITS) == (100, 19)
    each = 2 * 2 * 32 * 8 * 4
    assert spec.bytes_of((100, 19)) == (2 * 100 + 19) * each
    memory = (2 * 100 + 19) * each
    assert columns(spec, gpu(memory), 1.0, 0, None) == 100
    assert columns(spec, gpu(memory - 1), 1.0, 0, None) == 99
    shapes = [array.shape for array in spec.arrays((100, 19))]
    assert [shape[0] for shape in shapes] == [100, 19, 100]
