"""Whether other weights fit the programs of a running engine, and putting them where these expect them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def shapes_of(params: Any) -> Any:
    """What programs are compiled for: the shapes, dtypes and shardings of weights, without the weights."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)


def fitted(params: Any, wanted: Any, *, copy: bool) -> Any:
    """`params` as the tree of arrays that programs compiled for `wanted` take; waits until they are computed.

    An array that lies where it is wanted stays there, in the same buffers unless `copy` asks for others. What JAX may
    move freely, numpy arrays and arrays that are not committed to a device, is put there.

    Raises:
        ValueError: names every array that is missing, unexpected, deleted, or of another shape, dtype or sharding.
    """
    given, needed = _by_path(params), _by_path(wanted)
    problems = [f"missing: {path}" for path in needed if path not in given]
    problems += [f"unexpected: {path}" for path in given if path not in needed]
    for path in needed:
        if path in given and (problem := _misfit(given[path], needed[path])):
            problems.append(f"{path}: {problem}")
    if problems:
        raise ValueError("update_weights.params do not fit the engine:\n  " + "\n  ".join(problems))
    arrays = [_placed(given[path], needed[path].sharding, copy) for path in needed]
    # What failed to be computed is its owner's error, and not one of the step that would read it.
    return jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(wanted), arrays))


def deleted(params: Any) -> list[str]:
    """The paths of the arrays whose buffers are gone."""
    return [path for path, leaf in _by_path(params).items() if leaf.is_deleted()]


def _by_path(tree: Any) -> Mapping[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _misfit(leaf: Any, wanted: jax.ShapeDtypeStruct) -> str | None:
    """What keeps an array from taking the place of `wanted`, and what to do about it; None if nothing does."""
    if isinstance(leaf, jax.core.Tracer):
        return "is traced: call update_weights outside jax.jit and other transformations"
    if not isinstance(leaf, jax.Array | np.ndarray):
        return f"expected an array, found {type(leaf).__name__}"
    if leaf.shape != wanted.shape:
        return f"expected the shape {wanted.shape}, found {leaf.shape}"
    if leaf.dtype != wanted.dtype:
        return f"expected the dtype {wanted.dtype}, found {leaf.dtype}: convert it with .astype({str(wanted.dtype)!r})"
    if isinstance(leaf, np.ndarray):
        return None
    if leaf.is_deleted():
        return "was deleted, or donated to a program: give that program's result, or do not donate"
    if leaf.committed and not leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim):
        return (
            f"expected the sharding {wanted.sharding}, found {leaf.sharding}: have your program's out_shardings say "
            "so, or move it with jax.device_put; jax.tree.map(lambda leaf: leaf.sharding, llm.params) is the tree of "
            "all of them"
        )
    return None


def _placed(leaf: Any, sharding: Any, copy: bool) -> jax.Array:
    # On a CPU an array may otherwise be a view of numpy's memory, which its owner goes on writing to.
    source = leaf.copy() if isinstance(leaf, np.ndarray) else leaf
    placed: jax.Array = jax.device_put(source, sharding, may_alias=False if copy else None)
    return placed
