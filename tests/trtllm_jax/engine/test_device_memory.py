"""JAX's share of a GPU, and the check that weights fit, with devices that tell their memory."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
from pallas_kernels.devices import Platform
from trtllm_jax.engine import device_memory


@pytest.fixture(autouse=True)
def no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """No share in the environment, and whatever a test sets is gone after it."""
    for name in device_memory.SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def shares() -> dict[str, str]:
    return {name: os.environ[name] for name in device_memory.SETTINGS if name in os.environ}


def started(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr(device_memory.xla_bridge, "backends_are_initialized", lambda: yes)


def test_the_share_is_set_before_jax_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, False)
    device_memory.claim()
    assert shares() == {"XLA_CLIENT_MEM_FRACTION": "0.95"}


@pytest.mark.parametrize("name", device_memory.SETTINGS)
def test_a_share_that_the_user_named_is_left(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    started(monkeypatch, False)
    monkeypatch.setenv(name, "0.5")
    device_memory.claim()
    assert shares() == {name: "0.5"}


@pytest.mark.parametrize("backend", ["gpu", "cpu"])
def test_a_gpu_that_was_started_before_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    started(monkeypatch, True)
    monkeypatch.setattr(device_memory.Platform, "default", lambda: Platform(backend))
    monkeypatch.setattr(device_memory.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        device_memory.claim()
    assert shares() == {}
    assert ("XLA_CLIENT_MEM_FRACTION=0.95" in caplog.text) == (backend == "gpu")


def test_jax_tells_whether_it_was_started() -> None:
    """By a name that is not public: a newer jax without it is found here."""
    program = (
        "from trtllm_jax.engine import device_memory; import jax; bridge = device_memory.xla_bridge;"
        "first = bridge.backends_are_initialized(); jax.devices(); print(first, bridge.backends_are_initialized())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("False True\n", 0), ran.stderr


def mesh_with(*stats: dict[str, int] | None) -> Any:
    """A mesh whose local devices tell these numbers, two devices in all."""
    local = [SimpleNamespace(memory_stats=lambda of_device=of_device: of_device) for of_device in stats]
    return SimpleNamespace(local_devices=local, size=2)


@pytest.mark.parametrize(
    ("stats", "free"),
    [
        ([None, None], None),
        ([{}], None),
        ([{"bytes_limit": 10}], 10),
        ([{"bytes_limit": 10, "bytes_in_use": 3}, {"bytes_limit": 10, "bytes_in_use": 8}], 2),
        ([{"bytes_limit": 10}, {"bytes_limit": 9}, None], 9),
    ],
)
def test_the_fullest_local_device_counts(stats: list[dict[str, int] | None], free: int | None) -> None:
    assert device_memory.free_bytes(mesh_with(*stats)) == free


@pytest.mark.multi_device
def test_weights_that_do_not_fit_are_refused_with_the_size_that_does() -> None:
    mesh = sharding.make_mesh(2)
    split = jax.ShapeDtypeStruct((4, 2**20), jnp.float32, sharding=NamedSharding(mesh, P("tp")))
    shapes = {"layers": (split, split)}  # 16 MiB on each of two devices
    device_memory.check_weights(shapes, mesh_with(None))
    device_memory.check_weights(shapes, mesh_with({"bytes_limit": 20 * 2**20, "bytes_in_use": 4 * 2**20}))
    with pytest.raises(MemoryError, match=r"0\.0 GiB on each device .* tensor_parallel_size=4 or more"):
        device_memory.check_weights(shapes, mesh_with({"bytes_limit": 20 * 2**20, "bytes_in_use": 5 * 2**20}))
    for in_use in (20, 21):
        with pytest.raises(MemoryError, match=r"0\.0 GiB are free; choose a smaller model"):
            device_memory.check_weights(shapes, mesh_with({"bytes_limit": 20 * 2**20, "bytes_in_use": in_use * 2**20}))
