"""Collectives over the mesh axes that split a logical axis; every one is the identity outside `shard_map`.

These are the only places where devices talk to each other, so that a faster exchange replaces one function.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.rules import ShardingRules, rules_of_context


def _mapped(axes: tuple[str, ...], rules: ShardingRules | None) -> tuple[str, ...]:
    """The mesh axes over which the running `shard_map` truly splits any of the logical `axes`.

    Axes of one device are left out: XLA's CPU backend copies what it "reduces" over them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    named = (rules or rules_of_context()).mesh_axes(*axes)
    return tuple(name for name in named if name in mesh.manual_axes and mesh.shape[name] > 1)


def is_split(*axes: str, rules: ShardingRules | None = None) -> bool:
    """Whether devices hold different parts of any of the logical `axes`, by `rules` or those of the context."""
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
    """Which part of the logical `axis` this device holds: an int32 scalar, 0 where nothing is split."""
    names = _mapped((axis,), rules)
    return lax.axis_index(names) if names else jnp.int32(0)
