"""Nothing of a checkpoint is run: no pickle, no module of `auto_map`, no chat template outside the sandbox."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from jinja2.exceptions import SecurityError
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from checkpoints.checkpoint import open_checkpoint

WriteGguf = Callable[..., Path]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What is there once foreign code ran."""
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": np.zeros(3, np.float32)}, model / "model.safetensors")
    tokenizer = Tokenizer(WordLevel({"hello": 1, "<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(model)
    return model


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def read_everything(path: Path) -> None:
    """Open it as a model, and read what can be read."""
    checkpoint = open_checkpoint(path)
    try:
        for name, info in checkpoint.tensors.info.items():
            checkpoint.tensors.read(name, tuple(slice(None) for _ in info.shape))
    finally:
        checkpoint.load_tokenizer()


PICKLES = (
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth", "weights.npy",
    "weights.npz", "model.ckpt", "training_args.bin", "tokenizer.pkl", "vocab.pkl", "checkpoint",
    "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "_sharding", "default/_METADATA", "state/checkpoint",
    "d/manifest.ocdbt",
)  # fmt: skip


@pytest.mark.parametrize("beside", [True, False], ids=["beside safetensors", "alone"])
def test_planted_pickles_are_not_loaded(beside: bool, folder: Path, marker: Path) -> None:
    bomb = pickle.dumps(Bomb(marker))
    for name in PICKLES:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith((".npy", ".npz")):
            with path.open("wb") as file:
                save = np.save if name.endswith("y") else np.savez
                save(file, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
        else:
            path.write_bytes(bomb)
    if beside:
        read_everything(folder)
    else:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"_METADATA is not valid JSON"):
            read_everything(folder)
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # the bomb works


NAMES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_under_the_name_of_another_file_is_refused(
    name: str, protocol: int, folder: Path, marker: Path
) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb(marker), protocol))
    with pytest.raises(ValueError, match=rf"{name} is|model has no tokenizer"):
        read_everything(folder)
    assert not marker.exists()


def test_a_pickle_named_gguf_is_refused(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match=r"model\.gguf is not a GGUF file"):
        read_everything(tmp_path / "model.gguf")
    assert not marker.exists()


def plant_modules(folder: Path, marker: Path) -> None:
    """Modules that leave the marker when imported, and every field that could have them imported."""
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    for module in ("evil", "tokenization_evil", "configuration_evil", "modeling_evil"):
        (folder / f"{module}.py").write_text(code)
    auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoModel": "evil.Evil"}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content |= {"auto_map": auto_map, "tokenizer_class": "Evil", "trust_remote_code": True, "model_type": "evil"}
        (folder / name).write_text(json.dumps(content))


def test_modules_of_a_checkpoint_are_not_imported(folder: Path, marker: Path, tmp_path: Path) -> None:
    plant_modules(folder, marker)
    try:
        read_everything(folder)
    except ValueError as error:
        # Either answer will do, running the code will not.
        assert "code that a tokenizer brings is never run" in str(error)  # noqa: PT017
    assert not marker.exists()
    program = "import sys, transformers as t; t.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", program, folder], env=environment, capture_output=True, check=False)
    assert marker.exists()  # the module works where it is trusted


TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.mkdir(MARKER) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ lipsum.__globals__['os'].mkdir(MARKER) }}",
    "{% for m in messages %}{{ m.__init__.__globals__['os'].mkdir(MARKER) }}{% endfor %}",
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["chat_template.jinja", "tokenizer_config.json", "gguf"])
def test_a_chat_template_runs_in_the_sandbox(
    kind: str, template: str, folder: Path, marker: Path, write_gguf: WriteGguf
) -> None:
    template = template.replace("MARKER", repr(str(marker)))
    if kind == "chat_template.jinja":
        (folder / kind).write_text(template)
    elif kind == "tokenizer_config.json":
        config = json.loads((folder / kind).read_text())
        (folder / kind).write_text(json.dumps(config | {"chat_template": template}))
    else:
        tokens = {"tokens": ["a", "b"], "token_type": [1, 1], "merges": ["a b"], "model": "gpt2"}
        metadata = {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}
        metadata["tokenizer.ggml.tokens"] = ["a", "b", "ab"]
        metadata["tokenizer.ggml.token_type"] = [1, 1, 1]
        folder = write_gguf(metadata=metadata | {"tokenizer.chat_template": template})
    tokenizer = open_checkpoint(folder).load_tokenizer()
    assert tokenizer.chat_template == template
    with pytest.raises((SecurityError, jinja2.UndefinedError)):
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert not marker.exists()


def test_the_first_template_would_work_outside_the_sandbox(marker: Path) -> None:
    jinja2.Template(TEMPLATES[0].replace("MARKER", repr(str(marker)))).render()
    assert marker.exists()
