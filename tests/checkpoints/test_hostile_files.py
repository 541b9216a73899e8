"""Which files of a folder are opened: no pipes, no devices, and no links out of it but into the hub's cache."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.hub import locate

from .gguf_llama import LLAMA

WriteGguf = Callable[..., Path]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2}
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip
each_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Whoever opens a pipe that nobody writes to waits for ever: an error after ten seconds instead."""

    def fail(*_: Any) -> None:
        raise TimeoutError("still waiting after 10 seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete Hugging Face folder."""
    model = tmp_path / "model"
    model.mkdir()
    tokenizer = Tokenizer(WordLevel({"hello": 1, "<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(model)
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "generation_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"a": np.zeros(3, np.float32)}, model / "model.safetensors")
    return model


def read_all(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.info["a"].shape == (3,)
    assert checkpoint.load_tokenizer().encode("hello") == [1]
    return checkpoint


@each_file
def test_a_pipe_is_refused_without_waiting_for_it(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=rf"{name} is not a regular file; put the model's own file in its place"):
        read_all(folder)


@each_file
@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/mem"])
def test_a_link_to_a_device_or_out_of_the_folder_is_refused(name: str, target: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"{name} is (not a regular file|a link to .*, outside the model's folder)"):
        read_all(folder)


@each_file
def test_a_link_to_a_file_elsewhere_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(f"../{name}")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*{name}', outside the model's folder.*hard link"):
        read_all(folder)
    (folder / name).unlink()
    (folder / name).hardlink_to(tmp_path / name)  # the remedy
    read_all(folder)


@each_file
def test_broken_and_circular_links_are_named(name: str, folder: Path) -> None:
    for target in ("nowhere", name):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=rf"{name} cannot be read: .*Check the file"):
            read_all(folder)


def test_links_within_the_folder_and_to_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "data").mkdir()
    for name in FILES:
        (folder / name).rename(folder / "data" / name)
        (folder / name).symlink_to(f"data/{name}")
    (tmp_path / "link").symlink_to(folder)
    read_all(tmp_path / "link")


@pytest.mark.parametrize("shared", [False, True], ids=["blobs of the model", "blobs that models share"])
def test_a_snapshot_of_the_hub_cache_is_read(shared: bool, folder: Path, tmp_path: Path) -> None:
    """The layouts of huggingface_hub: snapshots/<revision>/<file> is a link to ../../blobs/<hash>."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, name in enumerate(FILES):
        blob = repository / "blobs" / f"{number:040x}"
        (folder / name).rename(blob)
        if shared:
            common = tmp_path / "hub" / "blobs" / "ab" / f"ab{number:062x}"
            common.parent.mkdir(parents=True, exist_ok=True)
            blob.rename(common)
            blob.symlink_to(f"../../blobs/ab/{common.name}")
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    read_all(snapshot)


def test_a_gguf_file_may_be_a_link_only_where_the_user_names_it(write_gguf: WriteGguf, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = write_gguf()
    target = path.rename(tmp_path / "elsewhere" / "model.gguf")
    (tmp_path / "folder").mkdir()
    link = tmp_path / "folder" / "model.gguf"
    link.symlink_to(target)
    assert open_checkpoint(link, gguf_architectures=[LLAMA]).config["hidden_size"] == 32
    with pytest.raises(ValueError, match=r"model\.gguf is a link to .*outside the model's folder"):
        open_checkpoint(link.parent)
    link.unlink()
    os.mkfifo(link)
    for model in (link, link.parent):
        with pytest.raises(ValueError, match=r"model\.gguf is not a regular file"):
            open_checkpoint(model)


@pytest.mark.parametrize(
    "shard",
    [
        "../elsewhere.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "", "\0", "a\nb.safetensors",
        "x" * 5000, "~/one.safetensors", "C:\\one.safetensors",
    ],
)  # fmt: skip
def test_an_index_leads_to_no_file_outside_its_folder(shard: str, folder: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json places|is missing|is not a regular file") as caught:
        read_all(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "one.safetensors")
    (folder / "one.safetensors").symlink_to("../one.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(ValueError, match=r"one\.safetensors is a link to .*outside the model's folder"):
        read_all(folder)


@pytest.mark.parametrize("name", FILES[:-1])
def test_an_empty_file_or_a_folder_in_its_place_is_named(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is|model has no tokenizer"):
        read_all(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is not a regular file|model has no tokenizer"):
        read_all(folder)


def test_a_file_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:  # tests may run as root, who may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"config\.json cannot be read: Permission denied"):
        read_all(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "a\0b"])
def test_a_name_that_no_path_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model '"):
        locate(name)
