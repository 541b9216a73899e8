"""Weights that a folder holds twice: equal ones load, different ones are used with a warning or refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import pieces
from checkpoints.checkpoint import open_checkpoint
from checkpoints.safetensors_source import SafetensorsSource

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
TABLE = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
INDEX = "model.safetensors.index.json"

Shards = Mapping[str, Mapping[str, np.ndarray]]


def changed(table: np.ndarray, row: int) -> np.ndarray:
    other = table.copy()
    other[row, -1] += 1
    return other


def write_tied(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    save_file(dict(tensors), folder / "model.safetensors")


def write_shards(folder: Path, shards: Shards, placed: Mapping[str, str]) -> None:
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(placed)}))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for each table."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 256)


UNFINISHED = np.where(np.arange(40)[:, None] == 7, np.float32(np.nan), TABLE)
ROUNDED = TABLE.astype(ml_dtypes.bfloat16)

COPIES = {
    "none": {EMBEDDINGS: TABLE},
    "a copy": {EMBEDDINGS: TABLE, HEAD: TABLE.copy()},
    "not all numbers": {EMBEDDINGS: UNFINISHED, HEAD: UNFINISHED.copy()},
    "of a wider dtype": {EMBEDDINGS: ROUNDED, HEAD: ROUNDED.astype(np.float32)},
    "no embeddings": {HEAD: TABLE},
}
OTHERS = {
    "the first row": changed(TABLE, 0),
    "the last row": changed(TABLE, 39),
    "rounded": ROUNDED,
    "more rows": np.concatenate([TABLE, TABLE[:1]]),
    "no numbers": np.full_like(TABLE, np.nan),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_tied_head_may_be_stored_too(copy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tied(tmp_path, COPIES[copy])
    assert open_checkpoint(tmp_path).config["tie_word_embeddings"] is True
    assert not caplog.records


@pytest.mark.parametrize("other", OTHERS)
def test_a_head_of_its_own_is_used(other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tied(tmp_path, {EMBEDDINGS: TABLE, HEAD: OTHERS[other]})
    with caplog.at_level(logging.WARNING, "trtllm_jax"):
        assert open_checkpoint(tmp_path).config["tie_word_embeddings"] is False
    assert HEAD in caplog.text
    assert EMBEDDINGS in caplog.text


def test_without_the_weights_the_configuration_is_taken_at_its_word(tmp_path: Path) -> None:
    write_tied(tmp_path, {EMBEDDINGS: TABLE, HEAD: changed(TABLE, 3)})
    assert open_checkpoint(tmp_path, weights=False).config["tie_word_embeddings"] is True


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    placed = {"a": "1.safetensors", "b": "2.safetensors"}
    write_shards(tmp_path, {"1.safetensors": {"a": TABLE}, "2.safetensors": {"a": TABLE, "b": TABLE}}, placed)
    assert SafetensorsSource(tmp_path).info.keys() == {"a", "b"}
    shards = {"1.safetensors": {"a": TABLE}, "2.safetensors": {"a": changed(TABLE, 39), "b": TABLE}}
    write_shards(tmp_path, shards, placed)
    with pytest.raises(ValueError, match=r"'a' differs between 1.safetensors.*and 2.safetensors"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "single", [{"a": TABLE, "b": changed(TABLE, 20)}, {"a": TABLE}, {"a": TABLE, "b": TABLE, "c": TABLE}]
)
def test_one_file_beside_the_shards(single: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    placed = {"a": "1.safetensors", "b": "2.safetensors"}
    write_shards(tmp_path, {"1.safetensors": {"a": TABLE}, "2.safetensors": {"b": TABLE}}, placed)
    save_file({"a": TABLE, "b": TABLE}, tmp_path / "model.safetensors")
    assert SafetensorsSource(tmp_path).info.keys() == {"a", "b"}
    save_file(dict(single), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"two models, model.safetensors and the shards of {INDEX}.*'[bc]'"):
        SafetensorsSource(tmp_path)


def test_an_index_may_name_the_one_file(tmp_path: Path) -> None:
    placed = {"a": "model.safetensors"}
    write_shards(tmp_path, {"model.safetensors": {"a": TABLE}}, placed)
    assert SafetensorsSource(tmp_path).info.keys() == {"a"}


def test_of_two_formats_it_is_said_which_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tied(tmp_path, {EMBEDDINGS: TABLE})
    (tmp_path / "model.Q4_0.gguf").touch()
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "_METADATA").touch()
    with caplog.at_level(logging.WARNING, "trtllm_jax"):
        assert open_checkpoint(tmp_path).gguf is None
    told = [record.getMessage() for record in caplog.records]
    assert [f"{tmp_path} holds weights as model.safetensors and as {other}: only the former are read" for other in (
        "model.Q4_0.gguf", "params/_METADATA",
    )] == told  # fmt: skip
