"""Where arrays of named axes lie on real meshes, and how long their axes are there."""

from __future__ import annotations

import math
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from sharding import DEFAULT_RULES, Extents, Repetition, ShardingRules, make_mesh

EXPERT_RULES = {"experts": ("ep", "tp"), "mlp": ("tp",), "rows": ("dp",)}


def mesh_of(**axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "embed"), P("tp", None)),
        (("embed", "kv_heads", "group", "head_dim"), P(None, "tp", None, None)),
        (("two", "mlp", "embed"), P(None, "tp", None)),
        (("embed",), P(None)),
        ((), P()),
    ],
)
def test_split_axes_name_their_mesh_axis_and_others_are_replicated(axes: tuple[str, ...], spec: P) -> None:
    assert ShardingRules(make_mesh()).spec(axes) == spec


@pytest.mark.multi_device(8)
def test_an_axis_may_be_split_over_two_mesh_axes() -> None:
    rules = ShardingRules(mesh_of(dp=2, ep=2, tp=2), EXPERT_RULES)
    assert rules.spec(("experts", "embed")) == P(("ep", "tp"), None)
    assert rules.spec(("rows", "mlp")) == P("dp", "tp")
    assert (rules.parts("experts"), rules.parts("mlp"), rules.parts("embed")) == (4, 2, 1)
    assert rules.mesh_axes("mlp", "experts", "embed") == ("tp", "ep")


@pytest.mark.multi_device(8)
def test_every_device_holds_its_part_of_an_axis_that_two_mesh_axes_split() -> None:
    """Each expert's number is on the devices at its place, the outermost mesh axis first."""
    mesh = mesh_of(dp=2, ep=2, tp=2)
    array = jax.device_put(np.arange(8), ShardingRules(mesh, EXPERT_RULES).sharding(("experts",)))
    held = {shard.device: np.asarray(shard.data).tolist() for shard in array.addressable_shards}
    for (_, ep, tp), device in np.ndenumerate(mesh.devices):
        first = 2 * (2 * ep + tp)
        assert held[device] == [first, first + 1]


@pytest.mark.multi_device(2)
def test_a_mesh_axis_that_is_not_there_splits_nothing() -> None:
    rules = ShardingRules(make_mesh(2), EXPERT_RULES)
    assert rules.spec(("rows", "experts")) == P(None, "tp")
    assert rules.extents({"rows": 3, "experts": 3}).padded == {"rows": 3, "experts": 4}


def test_rules_are_static_in_jit() -> None:
    traced = []

    @partial(jax.jit, static_argnums=0)
    def place(rules: ShardingRules, x: jax.Array) -> jax.Array:
        traced.append(rules)
        return jax.lax.with_sharding_constraint(x, rules.sharding(("vocab",)))

    for table in (DEFAULT_RULES, dict(DEFAULT_RULES), {"embed": ("tp",)}):
        place(ShardingRules(make_mesh(), table), np.arange(4))
    assert [rules.table for rules in traced] == [DEFAULT_RULES, {"embed": ("tp",)}]


@pytest.mark.multi_device(4)
def test_padding_of_smollm2_on_four_devices() -> None:
    sizes = {"vocab": 49152, "embed": 576, "mlp": 1536, "kv_heads": 3, "group": 3, "head_dim": 64, "layers": 30}
    extents = ShardingRules(make_mesh(4)).extents(sizes)
    assert extents == Extents(sizes, {"vocab": 49152, "mlp": 1536, "kv_heads": 4})


@pytest.mark.multi_device(8)
@given(
    sizes=st.dictionaries(st.sampled_from([*DEFAULT_RULES, "embed", "layers"]), st.integers(1, 10**6)),
    devices=st.integers(1, 8),
)
def test_padding_is_the_least_that_the_mesh_divides(sizes: dict[str, int], devices: int) -> None:
    padded = ShardingRules(make_mesh(devices)).extents(sizes).padded
    assert padded.keys() == sizes.keys() & DEFAULT_RULES.keys()
    for axis, size in padded.items():
        assert size % devices == 0
        assert 0 <= size - sizes[axis] < devices


@pytest.mark.multi_device(8)
def test_the_four_key_heads_of_qwen3_235b_are_held_twice_on_eight_devices() -> None:
    """Its 64 query heads are 8 a device, where zero heads would make them 16."""
    sizes = {"kv_heads": 4, "group": 16, "head_dim": 128}
    extents = ShardingRules(make_mesh(8)).extents(sizes)
    assert extents.repetitions == (Repetition("kv_heads", "group", 2),)
    assert (extents["kv_heads"], extents["group"], extents["head_dim"]) == (8, 8, 128)


@pytest.mark.multi_device(8)
def test_an_axis_of_some_layers_follows_the_rules_of_the_one_that_it_is_named_after() -> None:
    """Gemma 4 31B: 16 key-value heads in most layers, and 4 where all queries are shared by so many."""
    rules = ShardingRules(make_mesh(8))
    sizes = {"kv_heads": 16, "group": 2, "kv_heads/full": 4, "group/full": 8, "mlp/wide": 90}
    extents = rules.extents(sizes)
    assert extents.repetitions == (Repetition("kv_heads/full", "group/full", 2),)
    assert [extents[axis] for axis in sizes] == [16, 2, 8, 4, 96]
    assert rules.spec(("kv_heads/full", "group/full", "embed")) == rules.spec(("kv_heads", "group", "embed"))


@pytest.mark.multi_device(8)
@given(heads=st.integers(1, 16), group=st.integers(1, 16), devices=st.integers(1, 8))
def test_heads_are_repeated_exactly_where_no_query_head_is_added(heads: int, group: int, devices: int) -> None:
    extents = ShardingRules(make_mesh(devices)).extents({"kv_heads": heads, "group": group})
    assert bool(extents.repetitions) == any(heads * times == devices and group % times == 0 for times in range(2, 9))
    if extents.repetitions:
        assert (extents["kv_heads"], extents["kv_heads"] * extents["group"]) == (devices, heads * group)
    else:
        assert (extents["kv_heads"], extents["group"]) == (math.ceil(heads / devices) * devices, group)
