"""Checks of the arguments of a model's functions, which run while these are traced."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import ArrayLike


def checked_tokens(tokens: ArrayLike, ndim: int | None = None) -> jax.Array:
    """`tokens` as an array of integers [..., s] of at least one token, of `ndim` axes if that is given."""
    array = jnp.asarray(tokens)
    if array.ndim < 1 or array.size == 0 or (ndim is not None and array.ndim != ndim):
        wanted = "[..., tokens]" if ndim is None else "[rows, tokens]"
        raise ValueError(f"tokens have the shape {array.shape}; want {wanted}, with no dimension of 0")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"tokens have the dtype {array.dtype}; want integers")
    return array


def checked_lengths(lengths: ArrayLike, tokens: jax.Array) -> jax.Array:
    """`lengths` as an array of integers, one a sequence of `tokens` [..., s]."""
    array = jnp.asarray(lengths)
    if array.shape != tokens.shape[:-1] or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"lengths are {array.dtype}{list(array.shape)} for tokens {list(tokens.shape)}; "
            f"want integers {list(tokens.shape[:-1])}"
        )
    return array


def checked_types(types: ArrayLike, tokens: jax.Array) -> jax.Array:
    """`types` as an array of integers, one for each of `tokens`."""
    array = jnp.asarray(types)
    if array.shape != tokens.shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"token_types are {array.dtype}{list(array.shape)} for tokens {list(tokens.shape)}; want as many integers"
        )
    return array


def refuse_explicit_axes(params: Any) -> None:
    """ValueError if a weight is on a mesh of explicit axes, where operations need shardings that layers do not name."""
    for leaf in jax.tree.leaves(params):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"the weights are on a mesh with explicit axes, {dict(mesh.shape)}: make it with "
                "axis_types=(jax.sharding.AxisType.Auto,) * n, which is not the default of jax.make_mesh"
            )
