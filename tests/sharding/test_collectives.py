"""Collectives do nothing outside `shard_map`, and inside it what the logical axes ask for, on fake devices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding import all_gather, all_reduce, make_mesh, shard_index, spec_of

DEVICES = 4
X = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)

Function = Callable[..., jax.Array]

multi_device = pytest.mark.multi_device(DEVICES)


def on_parts(function: Function, axes: tuple[str, ...], out: P) -> np.ndarray:
    """`function` on devices that each hold their part of X, whose dimensions are the logical `axes`."""
    mesh = make_mesh(DEVICES)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec_of(axes), out_specs=out, check_vma=False)
    return np.asarray(jax.jit(mapped)(X))


@pytest.mark.parametrize("compiled", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_identity_outside_of_shard_map(compiled: Callable[[Function], Function]) -> None:
    np.testing.assert_array_equal(compiled(lambda x: all_reduce(x, "kv_heads", "mlp"))(X), X)
    np.testing.assert_array_equal(compiled(lambda x: all_gather(x, "vocab", 1))(X), X)
    index = compiled(lambda: shard_index("vocab"))()
    assert (index, index.dtype, index.shape) == (0, jnp.int32, ())


@multi_device
@pytest.mark.parametrize("axes", [("mlp",), ("kv_heads", "group", "head_dim"), ("kv_heads", "mlp")], ids=str)
def test_a_split_contraction_is_summed_over_its_parts_once(axes: tuple[str, ...]) -> None:
    summed = on_parts(lambda x: all_reduce(x.sum(0), *axes), ("mlp", "embed"), P())
    np.testing.assert_array_equal(summed, X.sum(0))


@multi_device
def test_what_no_mesh_axis_splits_stays_as_it_is() -> None:
    np.testing.assert_array_equal(on_parts(lambda x: all_reduce(x, "embed"), ("embed", "embed"), P()), X)
    np.testing.assert_array_equal(on_parts(lambda x: all_gather(x, "embed", 0), ("embed", "embed"), P()), X)
    indices = on_parts(lambda x: shard_index("embed")[None], ("mlp", "embed"), P("tp"))
    np.testing.assert_array_equal(indices, np.zeros(DEVICES))


@multi_device
@pytest.mark.parametrize("dimension", [0, 1])
def test_gathered_parts_are_in_order(dimension: int) -> None:
    axes = ("vocab", "embed") if dimension == 0 else ("embed", "vocab")
    np.testing.assert_array_equal(on_parts(lambda x: all_gather(x, "vocab", dimension), axes, P()), X)


@multi_device
def test_every_device_knows_which_part_it_holds() -> None:
    first_rows = on_parts(lambda x: x[0, 0][None] - 24 * shard_index("vocab"), ("vocab", "embed"), P("tp"))
    np.testing.assert_array_equal(first_rows, np.zeros(DEVICES))
