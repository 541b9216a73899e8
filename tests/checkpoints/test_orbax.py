"""Orbax folders, against Orbax itself: it restores what we write, and we read what it saves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import orbax_writer, pieces
from checkpoints.load import load_params
from checkpoints.orbax_folder import find_arrays
from checkpoints.orbax_source import OrbaxSource
from checkpoints.orbax_writer import array_infos, write_orbax
from checkpoints.source import TensorInfo
from checkpoints.table import Params, Stored, Weight, expand
from sharding import Extents, ShardingRules

TABLE = (
    Weight("embed", "vocab embed", (Stored("embed.weight", "vocab embed"),)),
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
    Weight("layers.{i}.o", "embed kv_heads head_dim", (Stored("layers.{i}.o.weight", "embed (kv_heads head_dim)"),)),
)
SIZES = {"layers": 2, "vocab": 32, "embed": 96, "kv_heads": 3, "group": 2, "head_dim": 4}
ROWS = expand(TABLE, SIZES["layers"])
BF16 = np.dtype(ml_dtypes.bfloat16)


class Memory:
    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.info = {name: TensorInfo(array.shape, array.dtype.name) for name, array in tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._tensors[name][index]


def tensors(dtype: Any = BF16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (32, 96)}
    for i in range(2):
        shapes |= {f"layers.{i}.{part}.weight": (size, 96) for part, size in {"q": 24, "k": 12, "v": 12}.items()}
        shapes[f"layers.{i}.o.weight"] = (96, 12)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def by_hand(stored: Mapping[str, np.ndarray]) -> Params:
    def layer(i: int) -> dict[str, np.ndarray]:
        heads = [stored[f"layers.{i}.{part}.weight"].reshape(3, -1, 4, 96) for part in "qkv"]
        return {"qkv": np.concatenate(heads, 1), "o": stored[f"layers.{i}.o.weight"].reshape(96, 3, 4)}

    return {"embed": stored["embed.weight"], "layers": (layer(0), layer(1))}


def write(folder: Path, stored: Mapping[str, np.ndarray], dtype: Any = None) -> list[tuple[int, int]]:
    source = Memory(stored)
    infos = array_infos(ROWS, source, SIZES, dtype)
    seen: list[tuple[int, int]] = []
    write_orbax(
        ROWS, source, folder, sizes=SIZES, infos=infos, split=frozenset({"vocab", "kv_heads"}),
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    return seen


def assert_same(found: Params, expected: Params) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Written by us, every array in several chunks."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2048)
    write(tmp_path / "params", tensors())
    return tmp_path / "params"


@pytest.mark.multi_device(4)
def test_orbax_restores_what_we_write_on_any_mesh(folder: Path) -> None:
    expected = by_hand(tensors())
    with ocp.StandardCheckpointer() as checkpointer:
        alone = checkpointer.restore(folder)
    assert_same(alone | {"layers": tuple(alone["layers"])}, expected)
    mesh = Mesh(np.array(jax.devices()[:3]), ("tp",))
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
        expected,
    )
    split = NamedSharding(mesh, PartitionSpec("tp"))
    target["layers"][0]["qkv"] = jax.ShapeDtypeStruct((3, 4, 4, 96), BF16, sharding=split)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, target)
    assert_same(restored, expected)
    assert restored["layers"][0]["qkv"].sharding == split


def test_the_bytes_are_all_there_and_progress_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2048)
    seen = write(tmp_path / "params", tensors())
    total = sum(array.nbytes for array in tensors().values())
    assert seen == sorted(seen)
    assert len(seen) > len(ROWS)
    assert seen[-1] == (total, total)


def save(folder: Path, tree: Params, how: str) -> None:
    if how == "standard":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, tree)
        return
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=how != "a folder each", use_zarr3=how == "zarr3")
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(jax.tree.map(jnp.asarray, tree)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
@pytest.mark.parametrize("how", ["standard", "pytree", "zarr3", "a folder each"])
def test_we_read_what_orbax_saves(how: str, tmp_path: Path) -> None:
    expected = by_hand(tensors())
    save(tmp_path / "trained", expected, how)
    source = OrbaxSource(tmp_path / "trained")
    assert source.info["layers.1.qkv"] == TensorInfo((3, 4, 4, 96), "bfloat16")
    part = np.s_[1:2, :, 1:3, 2:1000]
    np.testing.assert_array_equal(source.read("layers.1.qkv", part), expected["layers"][1]["qkv"][part])
    assert source.info.keys() == {row.path for row in ROWS}


@pytest.mark.multi_device(4)
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_loading_from_orbax_equals_loading_the_stored_tensors(folder: Path, dtype: np.dtype[Any]) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    where: dict[str, Any] = {
        "extents": Extents(SIZES, {"kv_heads": 4}),  # three heads on four devices
        "rules": ShardingRules(mesh),
        "dtype": dtype,
    }
    expected = load_params(TABLE, Memory(tensors()), **where)
    found = load_params(TABLE, OrbaxSource(folder), **where)
    assert_same(found, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, expected)


@pytest.mark.multi_device(4)
def test_a_shard_is_read_without_its_neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[slice, ...]]] = []
    read = OrbaxSource.read

    def recorded(source: OrbaxSource, name: str, index: tuple[slice, ...]) -> np.ndarray:
        asked.append((name, index))
        return read(source, name, index)

    monkeypatch.setattr(OrbaxSource, "read", recorded)
    rules = ShardingRules(Mesh(np.array(jax.devices()[:3]), ("tp",)), {"kv_heads": ("tp",)})
    load_params(TABLE, OrbaxSource(folder), extents=Extents(SIZES), rules=rules, dtype=BF16)
    heads = {"qkv": 0, "o": 1}
    cut = [index[heads[name[9:]]] for name, index in asked if name[9:] in heads]
    assert {part.stop - part.start for part in cut} == {1}
    assert len(cut) == 2 * 3 * (3 + 1)  # layers, devices, tensors


def test_tensors_of_several_dtypes_share_the_narrowest_that_holds_them(tmp_path: Path) -> None:
    stored = tensors()
    stored["layers.0.k.weight"] = stored["layers.0.k.weight"].astype(np.float16)
    write(tmp_path / "params", stored)
    dtypes = {name: info.dtype for name, info in OrbaxSource(tmp_path / "params").info.items()}
    assert (dtypes["layers.0.qkv"], dtypes["layers.1.qkv"], dtypes["embed"]) == ("float32", "bfloat16", "bfloat16")


def test_values_are_rounded_to_the_wanted_dtype(tmp_path: Path) -> None:
    write(tmp_path / "params", tensors(np.float32), BF16)
    found = OrbaxSource(tmp_path / "params").read("embed", np.s_[:, :])
    np.testing.assert_array_equal(found, tensors(np.float32)["embed.weight"].astype(BF16))


def interrupt() -> None:
    """Ctrl-C once the main thread waits for a result, and time in which one who did not wait would go on."""
    main = threading.main_thread().ident
    while "result" not in [frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._current_frames()[main])]:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)


def test_an_interrupt_waits_for_what_is_being_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = threading.Event()

    def save(*_: Any) -> None:
        interrupt()
        saved.set()

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", save)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "params", tensors())
    assert saved.is_set()


def test_an_interrupt_waits_for_what_is_being_written() -> None:
    promise, future = ts.Promise.new()

    def finish() -> None:
        interrupt()
        promise.set_result(None)

    def result() -> None:
        future.result()

    slow = SimpleNamespace(write=lambda _: SimpleNamespace(result=result, exception=future.exception))
    later = threading.Thread(target=finish)
    later.start()
    with pytest.raises(KeyboardInterrupt):
        orbax_writer._write(slow, np.zeros(3), "it")
    assert future.done()
    later.join()


def test_what_the_system_refuses_to_write_is_an_os_error(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("in the way")
    metadata = {"shape": [3], "chunks": [3], "dtype": "<f4", "compressor": None}
    files = {"driver": "file", "path": f"{folder}/x/"}
    store = ts.open(
        {"driver": "zarr", "kvstore": files, "metadata": metadata}, open=True, assume_metadata=True
    ).result()
    with pytest.raises(OSError, match="the array 'x': "):
        orbax_writer._write(store, np.zeros(3, np.float32), "the array 'x'")


def test_the_arrays_are_found_in_the_folder_or_one_below_it(folder: Path, tmp_path: Path) -> None:
    assert find_arrays(folder) == folder
    assert find_arrays(tmp_path) == folder
    (tmp_path / "empty").mkdir()
    assert find_arrays(tmp_path / "empty") is None
    folder.rename(tmp_path / "params.orbax-checkpoint-tmp")
    with pytest.raises(ValueError, match=r"params\.orbax-checkpoint-tmp, an Orbax checkpoint whose saving did not"):
        find_arrays(tmp_path)
    write(tmp_path / "a", tensors())
    assert find_arrays(tmp_path) == tmp_path / "a"
    write(tmp_path / "b", tensors())
    with pytest.raises(ValueError, match=r"holds several Orbax checkpoints \(a, b\)"):
        find_arrays(tmp_path)


def read_all(folder: Path) -> Params:
    source = OrbaxSource(folder)
    arrays = {name: source.read(name, (slice(None),) * len(info.shape)) for name, info in source.info.items()}
    layers = tuple({part: arrays[f"layers.{i}.{part}"] for part in ("qkv", "o")} for i in range(2))
    return {"embed": arrays["embed"], "layers": layers}


@pytest.mark.parametrize("how", ["ours", "standard", "a folder each"])
@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
def test_a_file_that_is_missing_or_cut_is_an_error_or_does_not_matter(damage: str, how: str, tmp_path: Path) -> None:
    folder = tmp_path / "params"
    if how == "ours":
        write(folder, tensors())
    else:
        save(folder, by_hand(tensors()), how)
    refused = []
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.unlink()
        if damage != "removed":
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
        try:
            assert_same(read_all(folder), by_hand(tensors()))
        except ValueError as error:
            assert str(folder) in str(error)  # noqa: PT017 - which files are needed is Orbax's affair
            refused.append(path.relative_to(folder))
        path.write_bytes(content)
    assert len(refused) >= 4  # the list of arrays, the database, its tree, and at least one file of values
    assert_same(read_all(folder), by_hand(tensors()))


def change(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "tree",
    [
        None, [], {"x": None}, {"x": {}}, {"x": {"key_metadata": None}}, {"x": {"key_metadata": [{"key": "../embed"}]}},
        {"x": {"key_metadata": [{"key": "/etc"}, {"key": "hosts"}]}}, {"x": {"key_metadata": []}},
        {"x": {"key_metadata": [{"key": ".."}]}}, {"x": {"key_metadata": [{"key": "absent"}]}}, {"x": 3},
    ],
)  # fmt: skip
def test_a_list_of_arrays_that_lies_is_refused(tree: Any, folder: Path) -> None:
    change(folder / "_METADATA", lambda content: content.update(tree_metadata=tree))
    with pytest.raises(ValueError, match="params"):
        OrbaxSource(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
@pytest.mark.parametrize("lie", [{"shape": [10**12, 96]}, {"chunks": [10**12, 96]}, {"shape": [32]}, {"dtype": "|O"}])
def test_an_array_that_lies_about_itself_is_refused(lie: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "params"
    save(folder, by_hand(tensors()), "a folder each")
    change(folder / "embed" / ".zarray", lambda content: content.update({"compressor": None} | lie))
    with pytest.raises(ValueError, match="params"):
        OrbaxSource(folder)


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"secret")
    (folder / "d" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="params holds 'link', which is no regular file"):
        OrbaxSource(folder)


def test_a_pipe_is_refused_rather_than_waited_for(folder: Path) -> None:
    (folder / "manifest.ocdbt").unlink()
    os.mkfifo(folder / "manifest.ocdbt")
    with pytest.raises(ValueError, match=r"params holds 'manifest\.ocdbt', which is no regular file"):
        OrbaxSource(folder)
