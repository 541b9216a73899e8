"""Collectives over the mesh axes that split a logical axis; each is the identity outside `shard_map`.

All communication between devices in a `shard_map` goes through these functions.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.rules import ShardingRules, rules_of_context


def _mapped(axes: tuple[str, ...], rules: ShardingRules | None) -> tuple[str, ...]:
    """The mesh axes over which the enclosing `shard_map` splits any of the logical `axes`.

    Mesh axes of size 1 are left out, because XLA's CPU backend copies an array that it reduces over them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    named = (rules or rules_of_context()).mesh_axes(*axes)
    return tuple(name for name in named if name in mesh.manual_axes and mesh.shape[name] > 1)


def is_split(*axes: str, rules: ShardingRules | None = None) -> bool:
    """Whether devices hold different parts of any of the logical `axes`, by `rules` or the context's rules."""
    return bool(_mapped(axes, rules))


def all_reduce(x: jax.Array, *axes: str, rules: ShardingRules | None = None) -> jax.Array:
    """The sum over the devices that hold the parts of a contraction along the logical `axes`."""
    names = _mapped(axes, rules)
    return lax.psum(x, names) if names else x


def all_gather(x: jax.Array, axis: str, dimension: int, rules: ShardingRules | None = None) -> jax.Array:
    """`x` with the parts of the logical `axis` joined along `dimension`, on every device."""
    names = _mapped((axis,), rules)
    return lax.all_gather(x, names, axis=dimension, tiled=True) if names else x


def shard_index(axis: str, rules: ShardingRules | None = None) -> jax.Array:
    """Which part of the logical `axis` this device holds: an int32 scalar, 0 if the axis is not split."""
    names = _mapped((axis,), rules)
    return lax.axis_index(names) if names else jnp.int32(0)
