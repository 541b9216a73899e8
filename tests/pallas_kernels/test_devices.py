from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels.devices import Platform


def device(platform: str, kind: str) -> Any:
    return SimpleNamespace(platform=platform, device_kind=kind)


def test_that_of_a_device() -> None:
    assert Platform.of_device(device("cpu", "cpu")) == Platform("cpu")
    h100 = Platform.of_device(device("gpu", "NVIDIA H100 80GB HBM3"))
    assert h100 == Platform("gpu", "NVIDIA H100 80GB HBM3")
    assert (h100.on_gpu, h100.on_cpu, h100.is_hopper) == (True, False, True)


def test_that_of_a_gpu_has_its_multiprocessors() -> None:
    gpu: Any = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", core_count=132)
    assert Platform.of_device(gpu) == Platform("gpu", "NVIDIA H200", 132)


@pytest.mark.parametrize(("name", "hopper"), [("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False), ("", False)])
def test_hopper_is_known_by_name(name: str, hopper: bool) -> None:
    assert Platform("gpu", name).is_hopper == hopper


def test_that_of_a_mesh_and_the_default_are_what_jax_computes_with() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    assert Platform.of(mesh) == Platform.default()
    assert Platform.default().kind == jax.default_backend()
