"""Which weights a running engine takes, where they then lie, and what it says of those that it does not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trtllm_jax.engine.weights import deleted, fitted, shapes_of

Tree = dict[str, Any]


def mesh(devices: int = 1, name: str = "tp", first: int = 0) -> Mesh:
    chosen = jax.devices()[first : first + devices]
    return jax.make_mesh((devices,), (name,), axis_types=(AxisType.Auto,), devices=chosen)


def tree(where: Mesh | None = None, seed: int = 0) -> Tree:
    draw = np.random.default_rng(seed)
    sharding = NamedSharding(where or mesh(), P((where or mesh()).axis_names[0]))
    layers = [{"up": draw.normal(size=(8, 4)), "down": draw.normal(size=(8, 6))} for _ in range(2)]
    host = {"embed": draw.normal(size=(16, 4)), "layers": tuple(layers)}
    return jax.tree.map(lambda leaf: jax.device_put(leaf.astype(np.float32), sharding), host)


def buffers(params: Tree) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]


def replaced(params: Tree, leaf: object) -> Tree:
    return params | {"layers": (params["layers"][0], params["layers"][1] | {"down": leaf})}


def test_what_fits_keeps_its_buffers() -> None:
    new = tree(seed=1)
    taken = fitted(new, shapes_of(tree()), copy=False)
    assert buffers(taken) == buffers(new)
    assert jax.tree.structure(taken) == jax.tree.structure(new)


def test_a_copy_has_other_buffers_in_the_same_place() -> None:
    new = tree(seed=1)
    taken = fitted(new, shapes_of(new), copy=True)
    assert set(buffers(taken)).isdisjoint(buffers(new))
    for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(new), strict=True):
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.multi_device(2)
@pytest.mark.parametrize("devices", [1, 2])
def test_another_name_for_the_same_place_keeps_the_buffers(devices: int) -> None:
    wanted = shapes_of(tree(mesh(devices)))
    new = tree(mesh(devices, "model"), seed=1)
    taken = fitted(new, wanted, copy=False)
    assert buffers(taken) == buffers(new)
    assert jax.tree.map(lambda leaf: leaf.sharding, taken) == jax.tree.map(lambda leaf: leaf.sharding, wanted)


def test_a_device_alone_is_the_same_place_as_a_mesh_of_it() -> None:
    new = jax.device_put(tree(), jax.devices()[0])
    assert buffers(fitted(new, shapes_of(tree()), copy=False)) == buffers(new)


@pytest.mark.multi_device(2)
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_what_no_device_holds_fast_is_placed(kind: Callable[[Any], Any], devices: int) -> None:
    wanted = tree(mesh(devices))
    new = jax.tree.map(lambda leaf: kind(np.asarray(leaf) + 1), wanted)
    taken = fitted(new, shapes_of(wanted), copy=False)
    for ours, like in zip(jax.tree.leaves(taken), jax.tree.leaves(wanted), strict=True):
        assert (ours.sharding, ours.committed) == (like.sharding, True)
        np.testing.assert_array_equal(ours, np.asarray(like) + 1)


def test_numpys_memory_stays_its_owners() -> None:
    room = np.ones(64 * 64 + 16, np.float32)
    first = -room.ctypes.data % 64 // room.itemsize
    aligned = room[first : first + 64 * 64].reshape(64, 64)  # which JAX takes for its own on a CPU, if it may
    wanted = {"embed": jax.device_put(np.zeros((64, 64), np.float32), NamedSharding(mesh(), P()))}
    taken = fitted({"embed": aligned}, shapes_of(wanted), copy=False)
    aligned[:] = 7
    assert (np.asarray(taken["embed"]) == 1).all()


def test_containers_may_differ_where_the_paths_are_the_same() -> None:
    new = tree()
    taken = fitted(new | {"layers": list(new["layers"])}, shapes_of(new), copy=False)
    assert jax.tree.structure(taken) == jax.tree.structure(new)


def test_every_wrong_path_is_named() -> None:
    params = tree()
    wrong = {"layers": ({"up": params["embed"]}, {**params["layers"][1], "gate": params["embed"]}), "head": None}
    with pytest.raises(ValueError, match="do not fit the engine") as caught:
        fitted(wrong, shapes_of(params), copy=False)
    assert str(caught.value).split("\n  ")[1:] == [
        "missing: embed",
        "missing: layers.0.down",
        "unexpected: layers.1.gate",
        "layers.0.up: expected the shape (8, 4), found (16, 4)",
    ]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda leaf: leaf[:4], r"expected the shape \(8, 6\), found \(4, 6\)"),
        (
            lambda leaf: leaf.astype(jnp.bfloat16),
            r"dtype float32, found bfloat16: convert it with .astype\('float32'\)",
        ),
        (lambda leaf: np.zeros((8, 6)), "found float64"),
        (lambda leaf: 3.0, "expected an array, found float"),
    ],
)
def test_an_array_that_does_not_fit_is_named_with_a_remedy(spoil: Callable[[Any], Any], says: str) -> None:
    params = tree()
    with pytest.raises(ValueError, match=f"layers.1.down: .*{says}"):
        fitted(replaced(params, spoil(params["layers"][1]["down"])), shapes_of(params), copy=False)


@pytest.mark.multi_device(2)
@pytest.mark.parametrize(("devices", "first", "spec"), [(2, 0, P()), (1, 1, P("tp")), (1, 0, P())])
def test_another_sharding_is_refused_and_the_remedy_works(devices: int, first: int, spec: P) -> None:
    params = tree(mesh(2))
    moved = jax.device_put(params["layers"][1]["down"], NamedSharding(mesh(devices, first=first), spec))
    for copy in (False, True):
        with pytest.raises(ValueError, match=r"layers.1.down: expected the sharding .*jax.device_put"):
            fitted(replaced(params, moved), shapes_of(params), copy=copy)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    taken = fitted(jax.device_put(replaced(params, moved), shardings), shapes_of(params), copy=False)
    np.testing.assert_array_equal(taken["layers"][1]["down"], params["layers"][1]["down"])


def test_donated_weights_are_refused() -> None:
    params = tree()
    jax.jit(lambda leaf: leaf + 1, donate_argnums=0)(params["layers"][1]["down"])
    assert deleted(params) == ["layers.1.down"]
    with pytest.raises(ValueError, match=r"layers.1.down: was deleted, or donated"):
        fitted(params, shapes_of(params), copy=False)


def test_a_call_while_tracing_is_refused() -> None:
    wanted = shapes_of(tree())
    with pytest.raises(ValueError, match=r"embed: is traced: .*outside jax.jit"):
        jax.jit(lambda params: fitted(params, wanted, copy=False))(tree())


def test_shapes_hold_no_memory() -> None:
    params = tree()
    shapes = shapes_of(params)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), params
    )
