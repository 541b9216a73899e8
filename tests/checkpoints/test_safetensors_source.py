from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.safetensors_source import SafetensorsSource

RNG = np.random.default_rng(0)
NAME = "model.safetensors"


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / f"{NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file_reads_as_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    values = RNG.integers(0, 100, (5, 7))
    dtypes = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8, np.bool_]
    save_file({np.dtype(d).name: values.astype(d) for d in dtypes}, tmp_path / NAME, metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path)
    expected = load_file(tmp_path / NAME)
    assert source.info.keys() == expected.keys()
    for name, whole in expected.items():
        assert (source.info[name].shape, source.info[name].dtype) == (whole.shape, name)
        for index in (np.s_[:, :], np.s_[1:4, :], np.s_[2:3, 3:7], np.s_[5:5, :]):
            part = source.read(name, index)
            assert part.dtype == whole.dtype
            np.testing.assert_array_equal(part, whole[index])


def test_float8_keeps_its_bits(tmp_path: Path) -> None:
    values = np.linspace(-4, 4, 24, dtype=np.float32).reshape(4, 6)
    tensors = {d.__name__: values.astype(d) for d in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}
    save_file(tensors, tmp_path / NAME)
    source = SafetensorsSource(tmp_path)
    for name, whole in tensors.items():
        assert source.info[name].dtype == name
        assert source.read(name, np.s_[1:3, :]).tobytes() == whole[1:3].tobytes()


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float32)}, tmp_path / NAME)
    source = SafetensorsSource(tmp_path)
    assert source.read("scalar", ()) == 3.5
    assert source.read("empty", np.s_[:, :]).shape == (0, 4)


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    a, b, c = (RNG.standard_normal((3, 4)).astype(np.float32) for _ in range(3))
    write_shards(tmp_path, {"one.safetensors": {"a": a, "b": b}, "two.safetensors": {"c": c}})
    source = SafetensorsSource(tmp_path)
    assert sorted(source.info) == ["a", "b", "c"]
    np.testing.assert_array_equal(source.read("b", np.s_[1:, :]), b[1:])
    np.testing.assert_array_equal(source.read("c", np.s_[:, :2]), c[:, :2])


def test_a_missing_shard_is_named_with_a_tensor_of_it(tmp_path: Path) -> None:
    write_shards(tmp_path, {"one.safetensors": {"a": np.zeros(2)}, "two.safetensors": {"c": np.zeros(2)}})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"two\.safetensors is missing; .* places 'c' in it"):
        SafetensorsSource(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"one.safetensors": {"a": np.zeros(2), "b": np.zeros(2)}})
    save_file({"a": np.zeros(2)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"one\.safetensors does not hold 'b'"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "../model.safetensors"}}', "not a file of its own folder"),
        ('{"weight_map": ["a"]}', "no 'weight_map'"),
        ("{}", "no 'weight_map'"),
        ("[]", "must be an object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / f"{NAME}.index.json").write_text(index)
    with pytest.raises(ValueError, match=rf"index\.json.*{message}"):
        SafetensorsSource(tmp_path)


def test_a_file_cut_off_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / NAME
    save_file({"first": np.arange(4.0), "second": np.arange(4.0)}, path)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
            SafetensorsSource(tmp_path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="'second' should end at byte 64 of its data, which has 63"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "'t' has bytes 0 to 8, which do not fit F32 \\[3\\]"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "do not fit"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "malformed"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "malformed"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "malformed"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "malformed"),
        ({"dtype": "F32", "data_offsets": [0, 8]}, "malformed"),
        ([], "malformed"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, "'t' is stored as 'F4'; supported: F64"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    write_raw(tmp_path / NAME, {"t": entry}, bytes(8))
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("header", [b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, header: bytes) -> None:
    write_raw(tmp_path / NAME, header, b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        SafetensorsSource(tmp_path)


def test_an_absurd_header_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="states a header of"):
        SafetensorsSource(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*; it holds no \.safetensors file"):
        SafetensorsSource(tmp_path)
    save_file({"a": np.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"it holds \['adapter\.safetensors'\]"):
        SafetensorsSource(tmp_path)
