"""What a start measured is used by the next one like it, and by no other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import make_mesh
from trtllm_jax.engine import build, sizing
from trtllm_jax.engine.config import EngineConfig
from trtllm_jax.engine.kv_cache import CacheSpec
from trtllm_jax.engine.sizing import Sizing
from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues

PAGE = 2 * 2 * 32 * 8 * 4


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    monkeypatch.setattr(sizing, "_sources", list)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


class Measured:
    """Programs that say how often somebody measured them."""

    times = 0

    def __init__(self, *_: Any) -> None: ...

    def temporary_bytes(self) -> int:
        type(self).times += 1
        return 10 * PAGE


def start(free_pages: int, **config: Any) -> int:
    """The pages of an engine of a pretended GPU with so much free memory."""
    device = SimpleNamespace(
        platform="gpu", device_kind="a GPU", memory_stats=lambda: {"bytes_limit": free_pages * PAGE}
    )
    mesh: Any = SimpleNamespace(devices=np.array([device], object), local_devices=[device])
    spec = CacheSpec.of([CacheGroup((0,), KeysAndValues(2, 8))], {}, 32, jnp.dtype("float32"), make_mesh(1))
    module = SimpleNamespace(__name__="a_model")
    model: Any = SimpleNamespace(
        module=module, config=SimpleNamespace(max_position=256), platform=SimpleNamespace(on_cpu=False)
    )
    engine_config = EngineConfig(**{"kv_fraction": 1.0, "max_batch_size": 4} | config)
    _, (pages,), measured = build._size(model, {}, mesh, engine_config, spec)
    if measured is not None:
        sizing.write(*measured)
    return pages


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> type[Measured]:
    monkeypatch.setattr(build, "Programs", Measured)
    monkeypatch.setattr(Measured, "times", 0)
    return Measured


def test_the_next_start_measures_nothing(measured: type[Measured]) -> None:
    assert [start(110), start(110)] == [100, 100]
    assert measured.times == 1
    assert start(110, max_num_tokens=64) == 100
    assert measured.times == 2, "another size is another start"
    assert start(110, kv_fraction=0.5) == 45
    assert measured.times == 3, "another share of the memory too"


def test_a_little_more_memory_gives_the_same_pages(measured: type[Measured]) -> None:
    assert [start(110), start(113), start(109), start(400)] == [100, 100, 99, 390]


def test_what_cannot_be_read_is_measured_again(measured: type[Measured], own_folder: Path) -> None:
    start(110)
    (kept,) = own_folder.rglob("*.json")
    for damaged in ("", "[]", '{"temporary_bytes": null, "columns": 3}'):
        kept.write_text(damaged)
        assert start(110) == 100
    assert measured.times == 4


def test_a_folder_that_cannot_be_written_is_no_failure(measured: type[Measured], own_folder: Path) -> None:
    (own_folder / "trtllm_jax_sizes").write_text("a file in its place")
    assert start(110) == start(110) == 100
    assert measured.times == 2


def test_another_version_of_the_code_is_another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sizing.key_of("model")
    monkeypatch.setattr(sizing, "_sources", lambda: [("steps.py", 1, 1)])
    assert sizing.key_of("model") != before
    sizing.write(before, Sizing(1, 2))
    assert sizing.read(before) == Sizing(1, 2)
    assert sizing.read(sizing.key_of("model")) is None
