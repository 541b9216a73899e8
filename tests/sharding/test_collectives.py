"""Collectives do nothing outside `shard_map`, and inside it what the logical axes ask for, on fake devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding import ShardingRules, all_gather, all_reduce, is_split, make_mesh, shard_index

DEVICES = 4
X = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)

Function = Callable[..., jax.Array]

multi_device = pytest.mark.multi_device(DEVICES)


def on_parts(function: Function, axes: tuple[str, ...], out: P, rules: ShardingRules | None = None) -> np.ndarray:
    """`function` on devices that each hold their part of X, whose dimensions are the logical `axes`."""
    rules = rules or ShardingRules(make_mesh(DEVICES))
    mapped = jax.shard_map(function, mesh=rules.mesh, in_specs=rules.spec(axes), out_specs=out, check_vma=False)
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


@pytest.mark.multi_device(8)
class TestAnAxisThatTwoMeshAxesSplit:
    """Experts over `ep` and `tp`, rows over `dp`, beside an axis over `tp` alone."""

    TABLE: ClassVar = {"experts": ("ep", "tp"), "mlp": ("tp",), "rows": ("dp",)}

    @pytest.fixture
    def rules(self) -> ShardingRules:
        mesh = jax.make_mesh((2, 2, 2), ("dp", "ep", "tp"), axis_types=(AxisType.Auto,) * 3)
        return ShardingRules(mesh, self.TABLE)

    def test_its_parts_are_summed(self, rules: ShardingRules) -> None:
        summed = on_parts(lambda x: all_reduce(x.sum(0), "experts", rules=rules), ("experts", "embed"), P(), rules)
        np.testing.assert_array_equal(summed, X.sum(0))

    def test_only_the_mesh_axes_of_the_axis_are_summed(self, rules: ShardingRules) -> None:
        halves = on_parts(lambda x: all_reduce(x.sum(1), "mlp", rules=rules), ("rows", "mlp"), P("dp"), rules)
        np.testing.assert_array_equal(halves, X.sum(1))

    def test_its_parts_are_gathered_in_order(self, rules: ShardingRules) -> None:
        for axes, dimension in ((("experts", "rows"), 0), (("rows", "experts"), 1)):
            out = P(None, "dp") if dimension == 0 else P("dp", None)
            gathered = on_parts(lambda x, at=dimension: all_gather(x, "experts", at, rules=rules), axes, out, rules)
            np.testing.assert_array_equal(gathered, X)

    def test_its_parts_are_numbered_in_order(self, rules: ShardingRules) -> None:
        first = on_parts(
            lambda x: x[0, :1] - 24 * shard_index("experts", rules=rules),
            ("experts", "embed"), P(("ep", "tp")), rules,
        )  # fmt: skip
        np.testing.assert_array_equal(first, np.zeros(4))

    def test_the_mixture_of_experts_of_a_matrix(self, rules: ShardingRules) -> None:
        """A product contracted over experts and over rows, against numpy's."""
        weights = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)

        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            assert is_split("experts", rules=rules)
            return all_reduce(jnp.einsum("er,er->", x, w), "experts", "rows", rules=rules)

        spec = rules.spec(("experts", "rows"))
        mapped = jax.shard_map(product, mesh=rules.mesh, in_specs=(spec, spec), out_specs=P(), check_vma=False)
        np.testing.assert_allclose(jax.jit(mapped)(X, weights), (X * weights).sum(), rtol=1e-5)
