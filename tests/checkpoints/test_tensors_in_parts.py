"""Tensors that a row's weight takes in several parts: queries, keys and values of different sizes in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import sharding
from checkpoints.load import load_params
from checkpoints.orbax_folder import find_arrays
from checkpoints.orbax_source import OrbaxSource
from checkpoints.orbax_writer import array_infos, write_orbax
from checkpoints.packed_source import PackedSource
from checkpoints.safetensors_source import SafetensorsSource
from checkpoints.shards import read_shard
from checkpoints.source import TensorInfo
from checkpoints.table import Stored, Weight, blocks, expand, leaf_of, stored_shapes, to_stored
from sharding import Extents, ShardingRules

HEADS = "(kv_heads qkv head_dim)"
TABLE = (
    Weight(
        "layers.{i}.qkv",
        "kv_heads qkv head_dim embed",
        tuple(Stored("layers.{i}.qkv.weight", f"{HEADS} embed", size) for size in ("group", 1, 1)),
        fuse="qkv",
    ),
    Weight(
        "layers.{i}.qkv_bias",
        "kv_heads qkv head_dim",
        tuple(Stored("layers.{i}.qkv.bias", HEADS, size) for size in ("group", 1, 1)),
        fuse="qkv",
    ),
    Weight(
        "layers.{i}.gate_up",
        "experts two mlp embed",
        (Stored("layers.{i}.{experts}.gate_up", "mlp embed"), Stored("layers.{i}.{experts}.gate_up", "mlp embed")),
        fuse="two",
    ),
)
SIZES = {"layers": 2, "kv_heads": 3, "group": 2, "head_dim": 4, "embed": 5, "mlp": 7, "experts": 2}
ROWS = expand(TABLE, SIZES["layers"])


def stored_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(2):
        shapes |= {f"layers.{i}.qkv.weight": (48, 5), f"layers.{i}.qkv.bias": (48,)}
        shapes |= {f"layers.{i}.{expert}.gate_up": (14, 5) for expert in range(2)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def by_hand(tensors: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """A layer without padding."""

    def heads(tensor: np.ndarray) -> np.ndarray:
        return np.concatenate([part.reshape(3, -1, 4, *tensor.shape[1:]) for part in np.split(tensor, [24, 36])], 1)

    experts = [tensors[f"layers.{i}.{expert}.gate_up"].reshape(2, 7, 5) for expert in range(2)]
    return {
        "qkv": heads(tensors[f"layers.{i}.qkv.weight"]),
        "qkv_bias": heads(tensors[f"layers.{i}.qkv.bias"]),
        "gate_up": np.stack(experts),
    }


class Recording:
    """Tensors in memory that know which of their rows were read."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.info = {name: TensorInfo(array.shape, array.dtype.name) for name, array in tensors.items()}
        self.rows: dict[str, set[int]] = {}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        self.rows.setdefault(name, set()).update(range(*index[0].indices(len(self._tensors[name]))))
        return self._tensors[name][index]


def test_the_parts_follow_one_another() -> None:
    places = blocks(ROWS[0], Extents(SIZES))
    assert [(block.offset, block.stored_shape) for block in places] == [(0, (24, 5)), (24, (12, 5)), (36, (12, 5))]
    assert stored_shapes(places) == {"layers.0.qkv.weight": (48, 5)}
    experts = blocks(ROWS[4], Extents(SIZES))
    assert [(block.name, block.offset) for block in experts] == [
        ("layers.0.0.gate_up", 0), ("layers.0.1.gate_up", 0), ("layers.0.0.gate_up", 7), ("layers.0.1.gate_up", 7)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "devices", [1, *(pytest.param(count, marks=pytest.mark.multi_device(count)) for count in (2, 4, 6))]
)
def test_loaded_on_any_mesh_and_written_back_bit_for_bit(devices: int, tmp_path: Path) -> None:
    tensors = stored_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    rules = ShardingRules(sharding.make_mesh(devices))
    extents = rules.extents(SIZES)
    params = load_params(TABLE, SafetensorsSource(tmp_path), extents=extents, rules=rules, dtype=np.float32)
    if devices == 1:
        for i, layer in enumerate(params["layers"]):
            for name, array in by_hand(tensors, i).items():
                np.testing.assert_array_equal(layer[name], array)
    restored: dict[str, np.ndarray] = {}
    for row in ROWS:
        restored |= dict(to_stored(row, leaf_of(params, row.path), extents))
    assert {name: array.tobytes() for name, array in restored.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


def test_only_the_wanted_heads_are_read() -> None:
    """One head of three: its queries, its key and its value, from three places of one tensor."""
    source = Recording(stored_tensors())
    row = ROWS[0]
    window = ((1, 2), (0, 4), (0, 4), (0, 5))
    shard = read_shard(row.axis_names, blocks(row, Extents(SIZES)), source, window, np.float32)
    np.testing.assert_array_equal(shard, by_hand(stored_tensors(), 0)["qkv"][1:2])
    assert source.rows["layers.0.qkv.weight"] == {*range(8, 16), *range(28, 32), *range(40, 44)}


@pytest.mark.parametrize(("rows", "found"), [(36, r"\(36, 5\)"), (49, r"\(49, 5\)")])
def test_a_tensor_that_the_parts_do_not_cover_is_refused(rows: int, found: str) -> None:
    tensors = stored_tensors() | {"layers.1.qkv.weight": np.zeros((rows, 5), np.float32)}
    rules = ShardingRules(sharding.make_mesh(1))
    with pytest.raises(ValueError, match=rf"layers.1.qkv.weight: expected the shape \(48, 5\), found {found}"):
        load_params(TABLE, Recording(tensors), extents=Extents(SIZES), rules=rules, dtype=np.float32)


def test_any_slice_of_a_tensor_is_cut_from_arrays_of_our_own(tmp_path: Path) -> None:
    tensors = stored_tensors()
    infos = array_infos(ROWS, Recording(tensors), SIZES, None)
    write_orbax(ROWS, Recording(tensors), tmp_path / "arrays", sizes=SIZES, infos=infos, split=frozenset())
    source = PackedSource(OrbaxSource(find_arrays(tmp_path / "arrays") or tmp_path), ROWS, SIZES)
    assert source.info == Recording(tensors).info
    for name, values in tensors.items():
        for start in range(0, len(values), 5):
            for stop in range(start, len(values) + 1, 3):
                index = (slice(start, stop), *[slice(1, 4)] * (values.ndim - 1))
                np.testing.assert_array_equal(source.read(name, index), values[index])


def test_parts_of_different_widths_are_refused() -> None:
    parts = (Stored("t", "(x two) y"), Stored("t", "(y two) x"))
    with pytest.raises(ValueError, match="parts of 't' that differ behind the first dimension"):
        Weight("a", "two x y", parts, fuse="two")


NORMS = Weight(
    "norm",
    "kv_heads qkv head_dim",
    (Stored("q.{kv_heads qkv}", "head_dim", "group"), Stored("k.{kv_heads}", "head_dim")),
    fuse="qkv",
)


@pytest.mark.parametrize(
    "devices", [1, *(pytest.param(count, marks=pytest.mark.multi_device(count)) for count in (2, 6))]
)
def test_a_tensor_for_each_head_is_found_on_any_mesh(devices: int) -> None:
    """Names may count through several axes: query heads are numbered without their key-value heads."""
    tensors = {f"q.{head}": np.full(4, head, np.float32) for head in range(6)}
    tensors |= {f"k.{head}": np.full(4, 10 + head, np.float32) for head in range(3)}
    rules = ShardingRules(sharding.make_mesh(devices))
    extents = rules.extents(SIZES)
    params = load_params([NORMS], Recording(tensors), extents=extents, rules=rules, dtype=np.float32)
    rows = {
        1: [[0, 1, 10], [2, 3, 11], [4, 5, 12]],
        2: [[0, 1, 10], [2, 3, 11], [4, 5, 12], [0, 0, 0]],
        6: [[0, 10], [1, 10], [2, 11], [3, 11], [4, 12], [5, 12]],
    }
    np.testing.assert_array_equal(np.asarray(params["norm"])[:, :, 0], rows[devices])
    restored = dict(to_stored(NORMS, params["norm"], extents))
    assert {name: array.tobytes() for name, array in restored.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }
