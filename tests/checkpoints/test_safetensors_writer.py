from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoints import pieces
from checkpoints.safetensors_file import DTYPES
from checkpoints.safetensors_source import SafetensorsSource
from checkpoints.safetensors_writer import tensor_infos, write_safetensors
from checkpoints.source import TensorInfo

TENSORS = {
    "layers.10.w": np.arange(60, dtype=np.float32).reshape(4, 15),
    "layers.9.w": np.arange(60, dtype=np.float16).reshape(15, 4),
    "bias": np.arange(3, dtype=np.int8),
    "embed": np.arange(21, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(7, 3),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float64),
}


class Memory:
    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors
        self.info = {name: TensorInfo(array.shape, array.dtype.name) for name, array in tensors.items()}
        self.largest = 0

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = self._tensors[name][index]
        self.largest = max(self.largest, part.nbytes)
        return part


def write(tensors: Mapping[str, np.ndarray], folder: Path, limit: int = 10**9, dtype: str | None = None) -> Memory:
    source = Memory(tensors)
    write_safetensors(source, folder, infos=tensor_infos(source, tensors, dtype), max_shard_bytes=limit)
    return source


@pytest.mark.parametrize("piece", [8, 16, 1 << 20])
def test_the_safetensors_package_reads_the_same_bytes(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
    source = write(TENSORS, tmp_path)
    assert source.largest <= piece
    theirs = load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert tuple(theirs[name].shape) == array.shape
        assert theirs[name].numpy(force=True).tobytes() == array.tobytes() if name != "embed" else True
    assert theirs["embed"].float().numpy().tolist() == TENSORS["embed"].astype(np.float32).tolist()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_dtype_is_read_back(tmp_path: Path) -> None:
    tensors = {name: np.arange(6).astype(dtype).reshape(2, 3) for name, dtype in DTYPES.items()}
    write(tensors, tmp_path)
    source = SafetensorsSource(tmp_path)
    for name, array in tensors.items():
        found = source.read(name, np.s_[:, :])
        assert found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()
        assert found.flags.aligned


def test_shards_are_bounded_numbered_and_indexed(tmp_path: Path) -> None:
    write(TENSORS, tmp_path, limit=130)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    sizes = []
    for file in files:
        held = load_file(tmp_path / file)
        assert held.keys() == {name for name, place in index["weight_map"].items() if place == file}
        sizes.append(sum(tensor.nbytes for tensor in held.values()))
    assert sum(sizes) == index["metadata"]["total_size"]
    assert sizes == [45, 120, 240, 8]  # layer 10 follows layer 9, and a tensor above the bound has its own file
    assert index["weight_map"]["layers.10.w"] == files[2]
    source = SafetensorsSource(tmp_path)
    assert source.info.keys() == TENSORS.keys()


def test_only_floating_point_tensors_are_rounded(tmp_path: Path) -> None:
    write(TENSORS, tmp_path, dtype="bfloat16")
    theirs = load_file(tmp_path / "model.safetensors")
    assert str(theirs.pop("bias").dtype) == "torch.int8"
    assert {str(tensor.dtype) for tensor in theirs.values()} == {"torch.bfloat16"}


def test_progress_counts_the_bytes_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = Memory(TENSORS)
    infos = tensor_infos(source, TENSORS, None)
    write_safetensors(source, tmp_path, infos=infos, max_shard_bytes=100, progress=lambda *step: seen.append(step))
    total = sum(array.nbytes for array in TENSORS.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
