from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from checkpoints.checkpoint import open_checkpoint
from checkpoints.json_file import MAX_BYTES

from .gguf_llama import LLAMA

WriteGguf = Callable[..., Path]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with one tensor."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, model / "model.safetensors")
    return model


def save_tokenizer(folder: Path, word: str) -> None:
    tokenizer = Tokenizer(WordLevel({word: 7, "<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def test_a_hugging_face_folder(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.path, checkpoint.config) == (folder, CONFIG)
    assert checkpoint.generation_config == {"eos_token_id": [2, 3]}
    assert checkpoint.tensors.info["a"].shape == (2, 3)
    np.testing.assert_array_equal(checkpoint.tensors.read("a", np.s_[1:, :]), [[3, 4, 5]])
    assert checkpoint.tensors is checkpoint.tensors


def test_a_string_and_the_home_directory_are_paths_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for name in (str(folder), "~/model", "./model", "model"):
        checkpoint = open_checkpoint(name)
        assert checkpoint.config == CONFIG
        assert checkpoint.generation_config == {}


def test_a_gguf_file_and_the_folder_of_one(write_gguf: WriteGguf) -> None:
    path = write_gguf()
    for model in (path, path.parent, str(path)):
        checkpoint = open_checkpoint(model, gguf_architectures=[LLAMA])
        assert checkpoint.path == path
        assert (checkpoint.config["model_type"], checkpoint.config["hidden_size"]) == ("llama", 32)
        assert checkpoint.tensors.info["model.embed_tokens.weight"].shape == (4, 32)


def test_a_gguf_file_of_an_unknown_architecture_has_no_configuration(write_gguf: WriteGguf) -> None:
    checkpoint = open_checkpoint(write_gguf(arch="mamba"), gguf_architectures=[LLAMA])
    for part in ("config", "tensors"):
        with pytest.raises(ValueError, match=r"model\.gguf has the architecture 'mamba'; supported in GGUF: llama"):
            getattr(checkpoint, part)


def test_a_folder_of_several_gguf_files_lists_them(write_gguf: WriteGguf) -> None:
    write_gguf(name="b-Q4_0.gguf")
    path = write_gguf(name="a-Q8_0.gguf")
    with pytest.raises(ValueError, match=r"several GGUF files \(a-Q8_0\.gguf, b-Q4_0\.gguf\); give the path of one"):
        open_checkpoint(path.parent)


def test_safetensors_win_over_gguf_files_beside_them(folder: Path, write_gguf: WriteGguf) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(name=name).rename(folder / name)
    assert open_checkpoint(folder).config == CONFIG


def test_a_folder_without_weights_is_opened_and_refused_when_they_are_wanted(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == CONFIG
    with pytest.raises(ValueError, match="holds neither"):
        _ = checkpoint.tensors


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_weights_that_would_have_to_be_unpickled_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    assert open_checkpoint(folder).config == CONFIG  # beside safetensors they do not matter
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"weights only as {name}: only safetensors, GGUF and Orbax are read"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[1, 2]", "holds a JSON list; it must be an object"),
        ("config.json", b"{", "is not valid JSON"),
        ("config.json", b"\xff\xfe\x00", "is not valid JSON"),
        ("config.json", b"[" * 200_000, "is not valid JSON"),
        ("generation_config.json", b"null", "holds a JSON NoneType; it must be an object"),
    ],
)
def test_json_of_another_kind_is_refused_by_name(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        open_checkpoint(folder)


def test_huge_json_is_refused_unread(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file
    with pytest.raises(ValueError, match=rf"config\.json has {MAX_BYTES + 1} bytes"):
        open_checkpoint(folder)


def test_other_files_and_folders_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors is neither a folder nor a \.gguf file; give the folder"):
        open_checkpoint(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json and no \.gguf file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none", "some/where/else", "none.gguf", "C:\\none"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="there is no such folder or file"):
        open_checkpoint(name)
    with pytest.raises(ValueError, match="there is no such folder or file"):
        open_checkpoint(Path("org/name"))
    with pytest.raises(ValueError, match="model is empty"):
        open_checkpoint(" ")


@pytest.mark.parametrize("name", ["org/unknown-model", "unknown-model", "not a name"])
def test_a_name_that_the_hub_does_not_give_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="could not be had from the Hugging Face hub at revision 'v1'") as caught:
        open_checkpoint(name, revision="v1")
    for remedy in (repr(name), "local folder or .gguf file", "network", "token"):
        assert remedy in str(caught.value)


def test_a_hub_name_is_downloaded_with_its_revision_and_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def download(name: str, **arguments: Any) -> str:
        calls.append({"name": name, **arguments})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("org/name", revision="v1", token="secret")
    assert (checkpoint.path, checkpoint.config) == (folder, CONFIG)
    assert (calls[0]["name"], calls[0]["revision"], calls[0]["token"]) == ("org/name", "v1", "secret")
    assert "*.safetensors" in calls[0]["allow_patterns"]
    assert not {"*.bin", "*.pth", "*.py"} & set(calls[0]["allow_patterns"])
    for copy_of_the_weights in ("onnx/model.safetensors", "consolidated.00.safetensors"):
        assert any(fnmatch(copy_of_the_weights, pattern) for pattern in calls[0]["ignore_patterns"])
    assert not any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in calls[0]["ignore_patterns"])

    save_tokenizer(folder, "hello")
    assert checkpoint.load_tokenizer(revision="v2").encode("hello") == [7]
    assert (calls[1]["name"], calls[1]["revision"], calls[1]["token"]) == ("org/name", "v2", "secret")
    assert "*.safetensors" not in calls[1]["allow_patterns"]
    assert "secret" not in repr(checkpoint)


def test_the_tokenizer_of_a_folder_or_of_another_one(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder, "hello")
    save_tokenizer(tmp_path / "other", "world")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.load_tokenizer().encode("hello") == [7]
    assert checkpoint.load_tokenizer(tokenizer_mode="slow").encode("hello") == [7]
    assert checkpoint.load_tokenizer(tmp_path / "other").encode("world") == [7]
    assert checkpoint.load_tokenizer(str(tmp_path / "other")).encode("hello") == [0]
    with pytest.raises(ValueError, match="tokenizer_mode is 'fast'; it must be one of"):
        checkpoint.load_tokenizer(tokenizer_mode="fast")


def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    with pytest.raises(ValueError, match="model has no tokenizer that transformers can load"):
        open_checkpoint(folder).load_tokenizer()


def test_code_of_a_checkpoint_is_not_run(folder: Path) -> None:
    save_tokenizer(folder, "hello")
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (folder / name).write_text(json.dumps(content))
    checkpoint = open_checkpoint(folder)
    try:
        checkpoint.load_tokenizer()
    except ValueError as error:
        assert "no tokenizer" in str(error)  # noqa: PT017 - either answer will do, running the code will not
    assert not (folder / "ran").exists()


def test_opening_a_checkpoint_imports_nothing_heavy(folder: Path) -> None:
    program = (
        "import sys, checkpoints.checkpoint as c; c.open_checkpoint(sys.argv[1]); "
        "heavy = 'jax', 'transformers', 'gguf', 'torch', 'tokenizers', 'huggingface_hub'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
