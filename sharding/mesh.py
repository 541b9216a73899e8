"""Builds the device mesh from the public API's parallel sizes."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh


class DeviceCountError(RuntimeError):
    """There are fewer devices than a mesh needs."""


def make_mesh(tensor_parallel_size: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axis `tp`, over the first devices of the default backend unless `devices` are given.

    Raises DeviceCountError, a RuntimeError, if there are fewer than `tensor_parallel_size` devices.
    """
    available = list(jax.devices() if devices is None else devices)
    if tensor_parallel_size > len(available):
        raise DeviceCountError(
            f"tensor_parallel_size={tensor_parallel_size} needs that many devices, but only {len(available)} "
            f"{available[0].platform} device(s) are available; use tensor_parallel_size={len(available)} or less"
        )
    return jax.make_mesh(
        (tensor_parallel_size,), ("tp",), axis_types=(AxisType.Auto,), devices=available[:tensor_parallel_size]
    )
