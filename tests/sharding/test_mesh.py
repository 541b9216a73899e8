from __future__ import annotations

import jax
import pytest

from sharding import make_mesh


def test_one_device_by_default() -> None:
    mesh = make_mesh()
    assert dict(mesh.shape) == {"tp": 1}
    assert list(mesh.devices.flat) == jax.devices()[:1]


@pytest.mark.multi_device(4)
def test_first_devices_of_those_given() -> None:
    chosen = jax.devices()[1:]
    mesh = make_mesh(3, chosen)
    assert dict(mesh.shape) == {"tp": 3}
    assert list(mesh.devices.flat) == chosen[:3]


def test_too_few_devices_are_an_error_that_names_the_remedy() -> None:
    devices = jax.devices()
    with pytest.raises(RuntimeError, match=rf"tensor_parallel_size={len(devices) + 1} .*={len(devices)} or less"):
        make_mesh(len(devices) + 1)
    with pytest.raises(RuntimeError, match="only 1 cpu device" if devices[0].platform == "cpu" else "only 1 "):
        make_mesh(2, devices[:1])
