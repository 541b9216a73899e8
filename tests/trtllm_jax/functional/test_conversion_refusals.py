"""What is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trtllm_jax import convert_checkpoint

from .converted import assert_same, tensors_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "gguf"}, "format = 'gguf' is unknown: use one of hf, orbax"),
        ({"dtype": "int8"}, "dtype = 'int8' is unknown: use one of float32, bfloat16, float16"),
        ({"max_shard_size": "much"}, "max_shard_size = 'much' is not a size"),
        ({"max_shard_size": 0}, "max_shard_size = 0 is not a size"),
        ({"max_shard_size": "5 XB"}, "max_shard_size = '5 XB' is not a size"),
        ({"config": "."}, "config = . is for a folder of Orbax arrays"),
        ({"tokenizer": "/no/such/folder"}, "there is no such folder or file"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    arguments: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tiny_llama, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_does_not_fit_is_refused_before_anything_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text())

    def refused(message: str, changes: dict[str, Any], **arguments: Any) -> None:
        (source / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "out", **arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    refused(r"missing: model\.layers\.2\.", {"num_hidden_layers": 3}, format="orbax")
    refused(
        "num_hidden_layers=100000000; it must be a whole number from 1 to",
        {"num_hidden_layers": 100_000_000},
        format="orbax",
    )
    refused("'OtherForCausalLM', which is not supported", {"architectures": ["OtherForCausalLM"]}, format="orbax")
    refused("holds quantised weights", {"quantization_config": {"quant_method": "fp8"}}, dtype="float32")


def test_the_output_must_be_free_apart_and_have_room(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a" / "source"
    shutil.copytree(tiny_llama, source)
    (source.parent / "config.json").write_text("{}")
    for output in (source, source / "inside", source.parent):
        with pytest.raises(ValueError, match="contain one another"):
            convert_checkpoint(source, output, overwrite=True)
    convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ValueError, match="out exists"):
        convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", dtype="bfloat16", overwrite=True)
    assert tensors_of(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ValueError, match=r"converted weights take 0\.\d GB, and .* has 0\.0 GB left"):
        convert_checkpoint(source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_links_are_followed_within_the_hubs_cache_only(tiny_llama: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(tiny_llama.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    assert_same(tensors_of(convert_checkpoint(snapshot, tmp_path / "out")), tensors_of(tiny_llama))
    (tmp_path / "secret").write_text("{}")
    (snapshot / "notes.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.json is a link to .*secret', outside the model's folder"):
        convert_checkpoint(snapshot, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
