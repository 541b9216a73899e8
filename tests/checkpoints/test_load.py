from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

from checkpoints.dummy import dummy_params
from checkpoints.load import load_params
from checkpoints.packed_source import PackedSource
from checkpoints.safetensors_source import SafetensorsSource
from checkpoints.shards import read_shard
from checkpoints.source import TensorInfo
from checkpoints.table import Params, Stored, Weight, blocks, expand, param_shapes, to_stored
from sharding import Extents, Repetition, ShardingRules

TABLE = (
    Weight("embed", "vocab embed", (Stored("embed.weight", "vocab embed"),)),
    Weight("norm", "embed", (Stored("norm.weight", "embed"),)),
    Weight(
        "layers.{i}.qkv",
        "kv_heads qkv head_dim embed",
        (
            Stored("layers.{i}.q.weight", "(kv_heads qkv head_dim) embed", "group"),
            Stored("layers.{i}.k.weight", "(kv_heads head_dim) embed"),
            Stored("layers.{i}.v.weight", "(kv_heads head_dim) embed"),
        ),
        fuse="qkv",
    ),
    Weight(
        "layers.{i}.qkv_bias",
        "kv_heads qkv head_dim",
        (
            Stored("layers.{i}.q.bias", "(kv_heads qkv head_dim)", "group"),
            Stored("layers.{i}.k.bias", "(kv_heads head_dim)"),
            Stored("layers.{i}.v.bias", "(kv_heads head_dim)"),
        ),
        fuse="qkv",
    ),
    Weight(
        "layers.{i}.out",
        "kv_heads group head_dim embed",
        (Stored("layers.{i}.o.weight", "embed (kv_heads group head_dim)"),),
    ),
    # Stored as one tensor in which the sharded axis is not outermost.
    Weight("layers.{i}.gate_up", "embed gate_up mlp", (Stored("layers.{i}.gate_up.weight", "(gate_up mlp) embed"),)),
    Weight("layers.{i}.down", "experts mlp embed", (Stored("layers.{i}.down.{experts}.weight", "embed mlp"),)),
)
SIZES = {
    "layers": 2,
    "vocab": 10,
    "embed": 6,
    "kv_heads": 3,
    "group": 2,
    "head_dim": 4,
    "gate_up": 2,
    "mlp": 7,
    "experts": 4,
}
PADDED = {"vocab": 12, "kv_heads": 4, "mlp": 8}
EXTENTS = Extents(SIZES, PADDED)
RULES = {"vocab": ("tp",), "kv_heads": ("tp",), "mlp": ("tp",), "experts": ("ep",)}


def mesh_of(dp: int, ep: int, tp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: dp * ep * tp]).reshape(dp, ep, tp), ("dp", "ep", "tp"))


def stored_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (10, 6), "norm.weight": (6,)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.q.weight": (24, 6),
            f"layers.{i}.k.weight": (12, 6),
            f"layers.{i}.v.weight": (12, 6),
            f"layers.{i}.q.bias": (24,),
            f"layers.{i}.k.bias": (12,),
            f"layers.{i}.v.bias": (12,),
            f"layers.{i}.o.weight": (6, 24),
            f"layers.{i}.gate_up.weight": (14, 6),
        }
        shapes |= {f"layers.{i}.down.{expert}.weight": (6, 7) for expert in range(4)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def layer_by_hand(tensors: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """What the table should make of a layer, in plain numpy, padded as PADDED says."""

    def heads(part: str, kind: str) -> np.ndarray:
        tensor = tensors[f"layers.{i}.{part}.{kind}"]
        return tensor.reshape(3, -1, 4, *tensor.shape[1:])

    def pad(array: np.ndarray, *last: tuple[int, int]) -> np.ndarray:
        widths = [(0, 0)] * array.ndim
        for axis, amount in last:
            widths[axis] = (0, amount)
        return np.pad(array, widths)

    gate, up = np.split(tensors[f"layers.{i}.gate_up.weight"], 2)
    return {
        "qkv": pad(np.concatenate([heads(part, "weight") for part in "qkv"], axis=1), (0, 1)),
        "qkv_bias": pad(np.concatenate([heads(part, "bias") for part in "qkv"], axis=1), (0, 1)),
        "out": pad(tensors[f"layers.{i}.o.weight"].T.reshape(3, 2, 4, 6), (0, 1)),
        "gate_up": pad(np.stack([gate.T, up.T], axis=1), (2, 1)),
        "down": pad(np.stack([tensors[f"layers.{i}.down.{expert}.weight"].T for expert in range(4)]), (1, 1)),
    }


def params_by_hand(tensors: Mapping[str, np.ndarray]) -> Params:
    return {
        "embed": np.pad(tensors["embed.weight"], [(0, 2), (0, 0)]),
        "norm": tensors["norm.weight"],
        "layers": (layer_by_hand(tensors, 0), layer_by_hand(tensors, 1)),
    }


class CountingSource:
    """Tensors in memory that know how many of their values were read."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.info = {name: TensorInfo(array.shape, array.dtype.name) for name, array in tensors.items()}
        self.read_values = dict.fromkeys(tensors, 0)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self._tensors[name][index]
        self.read_values[name] += part.size
        return part


def load(source: Any, mesh: Mesh, dtype: Any = np.float32, **kwargs: Any) -> Params:
    return load_params(TABLE, source, extents=EXTENTS, rules=ShardingRules(mesh, RULES), dtype=dtype, **kwargs)


@pytest.mark.multi_device(8)
@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 1, 4), (2, 1, 4), (1, 2, 4), (1, 4, 2)])
def test_every_shard_is_its_part_of_the_whole(layout: tuple[int, int, int]) -> None:
    tensors = stored_tensors()
    params = load(CountingSource(tensors), mesh_of(*layout))
    expected = params_by_hand(tensors)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for array, whole in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert array.shape == whole.shape
        assert len(array.addressable_shards) == np.prod(layout)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
    sharding = params["layers"][0]["qkv"].sharding
    assert sharding.shard_shape((4, 4, 4, 6))[0] == 4 // layout[2]


@pytest.mark.multi_device(8)
def test_replicated_shards_are_read_once_and_sharded_ones_in_parts() -> None:
    tensors = stored_tensors()
    source = CountingSource(tensors)
    load(source, mesh_of(2, 2, 2))
    inner_cut = {"layers.0.gate_up.weight", "layers.1.gate_up.weight"}  # read whole by each of the two shards
    for name, array in tensors.items():
        assert source.read_values[name] == array.size * (2 if name in inner_cut else 1), name


def test_values_round_once_to_the_wanted_dtype() -> None:
    tensors = stored_tensors()
    params = load(CountingSource(tensors), mesh_of(1, 1, 1), jnp.bfloat16)
    assert params["norm"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(params["norm"]), tensors["norm.weight"].astype(ml_dtypes.bfloat16))


@pytest.mark.multi_device(8)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_checkpoint_to_parameters_and_back_is_bit_exact(dtype: Any) -> None:
    tensors = stored_tensors(dtype)
    params = load(CountingSource(tensors), mesh_of(1, 2, 4), dtype)
    leaves = {row.path: row for row in expand(TABLE, SIZES["layers"])}
    restored: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        row = leaves[".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)]
        restored |= dict(to_stored(row, leaf, EXTENTS))
    assert restored.keys() == tensors.keys()
    for name, array in tensors.items():
        assert restored[name].dtype == array.dtype
        assert restored[name].tobytes() == array.tobytes()


def test_one_error_lists_every_missing_unused_and_misshapen_tensor() -> None:
    tensors = stored_tensors()
    del tensors["norm.weight"], tensors["layers.1.down.3.weight"]
    tensors["embed.weight"] = np.zeros((9, 6), np.float32)
    tensors["layers.0.o.weight"] = np.zeros((6, 24), np.int32)
    tensors |= {name: np.zeros(3, np.float32) for name in ("lm_head.weight", "layers.0.self_attn.rotary_emb.inv_freq")}
    with pytest.raises(ValueError, match="does not fit") as caught:
        load(CountingSource(tensors), mesh_of(1, 1, 1))
    assert str(caught.value).splitlines()[1:] == [
        "  missing: layers.1.down.3.weight",
        "  missing: norm.weight",
        "  unused: lm_head.weight",
        "  embed.weight: expected the shape (10, 6), found (9, 6)",
        "  layers.0.o.weight: expected floating point numbers, found int32",
    ]


def test_the_name_of_an_unused_tensor_is_shown_on_one_short_line() -> None:
    tensors = stored_tensors() | {"\n\x1b[2J" + "x" * 10**6: np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="does not fit") as caught:
        load(CountingSource(tensors), mesh_of(1, 1, 1))
    assert str(caught.value).splitlines()[1:] == [f"  unused:   [2J{'x' * 195}"]


def test_what_may_be_ignored_is_the_callers_choice() -> None:
    tensors = stored_tensors()
    tensors["lm_head.weight"] = tensors["embed.weight"]
    source = CountingSource(tensors)
    load(source, mesh_of(1, 1, 1), ignore=("lm_head.*",))
    assert source.read_values["lm_head.weight"] == 0


def test_nothing_is_read_before_all_names_are_checked() -> None:
    tensors = stored_tensors()
    del tensors["layers.1.q.bias"]
    source = CountingSource(tensors)
    with pytest.raises(ValueError, match=r"missing: layers\.1\.q\.bias"):
        load(source, mesh_of(1, 1, 1))
    assert not any(source.read_values.values())


def test_progress_grows_to_the_bytes_of_the_parameters() -> None:
    seen: list[tuple[int, int]] = []
    params = load(
        CountingSource(stored_tensors()), mesh_of(1, 1, 1), jnp.bfloat16, progress=lambda *step: seen.append(step)
    )
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {of for _, of in seen} == {total}
    assert seen[-1][0] == total


def packed() -> tuple[CountingSource, PackedSource]:
    """The same tensors read out of our arrays, and the arrays."""
    tensors = CountingSource(stored_tensors())
    params = load_params(
        TABLE, tensors, extents=Extents(SIZES), rules=ShardingRules(mesh_of(1, 1, 1), RULES), dtype="f4"
    )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = CountingSource({jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(a) for p, a in leaves})
    return arrays, PackedSource(arrays, expand(TABLE, SIZES["layers"]), SIZES)


def test_any_part_of_a_stored_tensor_is_read_out_of_our_arrays() -> None:
    arrays, source = packed()
    tensors = stored_tensors()
    assert source.info == {name: TensorInfo(array.shape, "float32") for name, array in tensors.items()}
    rng = np.random.default_rng(1)
    for name, array in tensors.items():
        for _ in range(40):
            bounds = [sorted(rng.integers(0, length + 1, 2).tolist()) for length in array.shape]
            index = tuple(slice(*pair) for pair in bounds)
            np.testing.assert_array_equal(source.read(name, index), array[index], err_msg=f"{name} {index}")
    arrays.read_values = dict.fromkeys(arrays.read_values, 0)
    source.read("layers.0.gate_up.weight", np.s_[8:11, :])  # three of seven rows of its second half
    assert arrays.read_values["layers.0.gate_up"] == 3 * SIZES["embed"]


def test_arrays_that_are_missing_unused_or_misshapen_are_named_by_their_paths() -> None:
    tensors = {"embed": np.zeros((10, 6)), "norm": np.zeros((7,)), "other": np.zeros(1)}
    with pytest.raises(ValueError, match="does not fit") as caught:
        PackedSource(CountingSource(tensors), expand(TABLE, 1), SIZES)
    assert str(caught.value).splitlines()[1:] == [
        *(f"  missing: layers.0.{name}" for name in ("down", "gate_up", "out", "qkv", "qkv_bias")),
        "  unused: other",
        "  norm: expected the shape (6,), found (7,)",
    ]


def test_of_a_group_only_the_wanted_part_is_read() -> None:
    """One index of the outer axis and a part of the inner one: what a window of a fused array asks for."""
    source = CountingSource(stored_tensors())
    row = next(row for row in expand(TABLE, 1) if row.path == "layers.0.gate_up")
    window = ((0, 6), (1, 2), (2, 5))  # embed, gate_up, mlp
    shard = read_shard(row.axis_names, blocks(row, Extents(SIZES)), source, window, np.float32)
    np.testing.assert_array_equal(shard, params_by_hand(stored_tensors())["layers"][0]["gate_up"][:, 1:2, 2:5])
    assert source.read_values["layers.0.gate_up.weight"] == shard.size


def test_the_arrays_do_not_share_memory_with_the_file(tmp_path: Path) -> None:
    tensors = stored_tensors()
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    params = load(SafetensorsSource(tmp_path), mesh_of(1, 1, 1))
    mapped = np.memmap(path, np.uint8, "r+")
    mapped[mapped.size // 2 :] = 0xFF
    mapped.flush()
    for array, whole in zip(jax.tree.leaves(params), jax.tree.leaves(params_by_hand(tensors)), strict=True):
        np.testing.assert_array_equal(np.asarray(array), whole)


@pytest.mark.multi_device(8)
def test_shapes_are_known_without_a_checkpoint() -> None:
    mesh = mesh_of(1, 2, 4)
    shapes = param_shapes(TABLE, extents=EXTENTS, rules=ShardingRules(mesh, RULES), dtype=jnp.bfloat16)
    assert_matches(load(CountingSource(stored_tensors()), mesh, jnp.bfloat16), shapes)


def assert_matches(params: Params, shapes: Params) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for array, expected in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (expected.shape, expected.dtype, expected.sharding)


OWN = (
    replace(TABLE[1], dtype="float32"),
    *(replace(row, format="int8", inputs=2) for row in TABLE if row.path == "layers.{i}.down"),
)
"""A norm that keeps its dtype, and a weight whose scales have one axis, that of the experts."""


@pytest.mark.multi_device(8)
def test_a_row_may_state_its_dtype_and_its_format() -> None:
    """Loaded and drawn; the scales lie as the outputs do."""
    names = ("norm.weight", *(f"layers.{i}.down.{expert}.weight" for i in range(2) for expert in range(4)))
    tensors = {name: stored_tensors()[name] for name in names}
    where: Any = {"extents": EXTENTS, "rules": ShardingRules(mesh_of(1, 2, 4), RULES), "dtype": jnp.bfloat16}
    steps: list[tuple[int, int]] = []
    params = load_params(OWN, CountingSource(tensors), **where, progress=lambda *step: steps.append(step))
    for found in (params, dummy_params(OWN, **where)):
        assert_matches(found, param_shapes(OWN, **where))
        assert found["norm"].dtype == jnp.float32
    down = params["layers"][1]["down"]
    assert (down.values.shape, down.scales.shape) == ((4, 8, 6), (4,))
    assert (down.values.sharding.spec[0], down.scales.sharding.spec[0]) == ("ep", "ep")
    whole = layer_by_hand(stored_tensors(ml_dtypes.bfloat16), 1)["down"].astype(np.float32)
    np.testing.assert_allclose(down.scales, np.abs(whole).max((1, 2)) / 127, rtol=1e-6)
    np.testing.assert_allclose(
        down.dequantized(jnp.dtype(jnp.float32)), whole, atol=0.501 * np.asarray(down.scales).max()
    )
    assert steps[-1] == (6 * 4 + 2 * (4 * 8 * 6 + 4 * 4),) * 2


PREFIXED = (
    Weight("norm", "embed", (Stored("model.norm.weight", "embed"),)),
    Weight("bias", "embed", (Stored("model.norm.bias", "embed"),)),
    Weight("head", "vocab embed", (Stored("lm_head.weight", "vocab embed"),)),
)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_models_saved_without_their_heads_lack_a_prefix(prefix: str) -> None:
    """Their heads, should there be ones all the same, do not."""
    shapes = {f"{prefix}norm.weight": 1, f"{prefix}norm.bias": 1, "lm_head.weight": 2}
    sizes = (SIZES["vocab"], SIZES["embed"])
    tensors = {name: np.full(sizes[2 - rank :], at, np.float32) for at, (name, rank) in enumerate(shapes.items())}
    where: Any = {"extents": Extents(SIZES), "rules": ShardingRules(mesh_of(1, 1, 1), RULES), "dtype": np.float32}
    params = load_params(PREFIXED, CountingSource(tensors), **where)
    assert [float(params[path].max()) for path in ("norm", "bias", "head")] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"model\.other"):
        load_params(PREFIXED, CountingSource(tensors | {f"{prefix}other": np.zeros(2)}), **where)
    with pytest.raises(ValueError, match=r"(?m)^.*\bother\.weight"):  # of another architecture, under its own names
        load_params(PREFIXED, CountingSource({"other.weight": np.zeros(2)}), **where)


@pytest.mark.multi_device(4)
def test_a_weight_may_be_a_number() -> None:
    """Loaded, written back and drawn, on every device."""
    row = Weight("beta", "", (Stored("act_fn.beta", ""),))
    where: Any = {"extents": EXTENTS, "rules": ShardingRules(mesh_of(1, 1, 4), RULES), "dtype": jnp.float32}
    params = load_params((row,), CountingSource({"act_fn.beta": np.float32(0.5).reshape(())}), **where)
    for found in (params, dummy_params((row,), **where)):
        assert_matches(found, param_shapes((row,), **where))
    ((name, written),) = to_stored(row, params["beta"], EXTENTS)
    assert (name, written.shape, written) == ("act_fn.beta", (), 0.5)


@pytest.mark.multi_device(4)
def test_dummy_parameters_are_the_same_on_every_mesh_and_padded_with_zeros() -> None:
    def dummy(mesh: Mesh, extents: Extents) -> Params:
        qkv = tuple(row for row in TABLE if row.path == "layers.{i}.qkv")  # a program is slow to compile
        arguments: Any = {"extents": extents, "rules": ShardingRules(mesh, RULES), "dtype": np.dtype(np.float32)}
        steps: list[tuple[int, int]] = []
        params = dummy_params(qkv, **arguments, progress=lambda *step: steps.append(step))
        assert_matches(params, param_shapes(qkv, **arguments))
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert steps == [(total // 2, total), (total, total)]
        return jax.tree.map(np.asarray, params)

    alone = dummy(mesh_of(1, 1, 1), Extents(SIZES))["layers"]
    spread = dummy(mesh_of(1, 1, 4), Extents(SIZES, {"kv_heads": 4, "group": 3}))["layers"]
    for i in range(2):
        np.testing.assert_array_equal(spread[i]["qkv"][:3, [0, 1, 3, 4]], alone[i]["qkv"])
        assert not spread[i]["qkv"][3:].any()
        assert not spread[i]["qkv"][:, 2].any()
    assert (alone[0]["qkv"] != alone[1]["qkv"]).all()
    values = np.concatenate([layer["qkv"].ravel() for layer in alone])
    assert abs(values.std() / 0.02 - 1) < 0.15
    assert abs(values.mean()) < 0.003


class TestRepeatedHeads:
    """Three key-value heads of two queries each on six devices: each head is there twice, with one query each."""

    EXTENTS = Extents(SIZES, {"vocab": 12, "mlp": 12}, (Repetition("kv_heads", "group", 2),))

    def load(self, tensors: Mapping[str, np.ndarray], dtype: Any = np.float32) -> Params:
        rules = ShardingRules(mesh_of(1, 1, 6), RULES)
        return load_params(TABLE, CountingSource(tensors), extents=self.EXTENTS, rules=rules, dtype=dtype)

    @pytest.mark.multi_device(6)
    def test_queries_are_dealt_out_and_keys_and_values_repeated(self) -> None:
        tensors = stored_tensors()
        for i, layer in enumerate(self.load(tensors)["layers"]):
            for name, kind in (("qkv", "weight"), ("qkv_bias", "bias")):
                q, k, v = (
                    tensors[f"layers.{i}.{part}.{kind}"].reshape(-1, 4, *[6][: kind == "weight"]) for part in "qkv"
                )
                expected = [np.stack([q[head], k[head // 2], v[head // 2]]) for head in range(6)]
                np.testing.assert_array_equal(layer[name], np.stack(expected))
            np.testing.assert_array_equal(layer["out"], tensors[f"layers.{i}.o.weight"].T.reshape(6, 1, 4, 6))

    @pytest.mark.multi_device(6)
    def test_every_shard_is_its_part_of_the_whole(self) -> None:
        for array in jax.tree.leaves(self.load(stored_tensors())):
            whole = np.asarray(array)
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])

    @pytest.mark.multi_device(6)
    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
    def test_checkpoint_to_parameters_and_back_is_bit_exact(self, dtype: Any) -> None:
        tensors = stored_tensors(dtype)
        params = self.load(tensors, dtype)
        restored: dict[str, np.ndarray] = {}
        for row in expand(TABLE, SIZES["layers"]):
            leaf = params
            for key in row.path.split("."):
                leaf = leaf[int(key) if key.isdigit() else key]
            written = list(to_stored(row, leaf, self.EXTENTS))
            assert not restored.keys() & {name for name, _ in written}
            restored |= dict(written)
        assert {name: array.tobytes() for name, array in restored.items()} == {
            name: array.tobytes() for name, array in tensors.items()
        }

    @pytest.mark.multi_device(6)
    def test_any_window_is_read_without_what_it_does_not_hold(self) -> None:
        row = next(row for row in expand(TABLE, 1) if row.path == "layers.0.qkv")
        whole = np.asarray(self.load(stored_tensors())["layers"][0]["qkv"])
        rng = np.random.default_rng(2)
        for _ in range(40):
            window = tuple(tuple(sorted(rng.integers(0, length + 1, 2).tolist())) for length in whole.shape)
            shard = read_shard(
                row.axis_names, blocks(row, self.EXTENTS), CountingSource(stored_tensors()), window, np.float32
            )
            np.testing.assert_array_equal(shard, whole[tuple(slice(*part) for part in window)])
        source = CountingSource(stored_tensors())
        read_shard(row.axis_names, blocks(row, self.EXTENTS), source, ((3, 4), (0, 3), (0, 4), (0, 6)), np.float32)
        assert {source.read_values[f"layers.0.{part}.weight"] for part in "qkv"} == {4 * 6}

    @pytest.mark.multi_device(6)
    def test_dummy_parameters_are_those_of_one_device(self) -> None:
        row = tuple(row for row in TABLE if row.path in ("layers.{i}.qkv", "layers.{i}.out"))
        alone, spread = (
            dummy_params(row, extents=extents, rules=ShardingRules(mesh_of(1, 1, parts), RULES), dtype=np.float32)
            for extents, parts in ((Extents(SIZES), 1), (self.EXTENTS, 6))
        )
        assert_matches(
            spread, param_shapes(row, extents=self.EXTENTS, rules=ShardingRules(mesh_of(1, 1, 6), RULES), dtype="f4")
        )
        for one, six in zip(alone["layers"], spread["layers"], strict=True):
            for head in range(6):
                kv, query = divmod(head, 2)
                np.testing.assert_array_equal(six["qkv"][head], np.asarray(one["qkv"])[kv, [query, 2, 3]])
                np.testing.assert_array_equal(six["out"][head, 0], one["out"][kv, query])

    def test_axes_that_cannot_be_seen_otherwise_are_refused(self) -> None:
        interleaved = Weight("w", "kv_heads group", (Stored("w", "(group kv_heads)"),))
        with pytest.raises(
            ValueError, match=r"'w' has the axes \('group', 'kv_heads'\).*'group' must follow 'kv_heads'"
        ):
            blocks(interleaved, self.EXTENTS)
