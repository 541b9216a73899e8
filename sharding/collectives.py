"""Collectives over the mesh axes that split a logical axis; every one is the identity outside `shard_map`.

These are the only places where devices talk to each other, so that a faster exchange replaces one function.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.rules import mesh_axes_of


def _mapped(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes over which the running `shard_map` truly splits any of the logical `axes`.

    Axes of one device are left out: XLA's CPU backend copies what it "reduces" over them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in mesh_axes_of(axes) if name in mesh.manual_axes and mesh.shape[name] > 1)


def is_split(*axes: str) -> bool:
    """Whether devices hold different parts of any of the logical `axes`."""
    return bool(_mapped(axes))


def all_reduce(x: jax.Array, *axes: str) -> jax.Array:
    """The sum over the devices that hold the parts of a contraction along the logical `axes`."""
    names = _mapped(axes)
    return lax.psum(x, names) if names else x


def all_gather(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """`x` with the parts of the logical `axis` joined along `dimension`, on every device."""
    for name in _mapped((axis,)):
        x = lax.all_gather(x, name, axis=dimension, tiled=True)
    return x


def shard_index(axis: str) -> jax.Array:
    """Which part of the logical `axis` this device holds: an int32 scalar, 0 where nothing is split."""
    for name in _mapped((axis,)):
        return lax.axis_index(name)
    return jnp.int32(0)
