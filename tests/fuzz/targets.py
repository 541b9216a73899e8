"""What is fuzzed, and what must hold: a file is read, or refused by a clear ValueError, within a second."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors

from checkpoints import gguf_tokenizer, hf_tokenizer, llama2c_tokenizer
from checkpoints.gguf_architecture import find_architecture
from checkpoints.gguf_config import generation_config, model_config
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_source import GgufSource
from checkpoints.json_file import read_object
from checkpoints.llama2c import Llama2cFile
from checkpoints.safetensors_source import SafetensorsSource
from checkpoints.source import TensorSource
from trtllm_jax.models import architecture, gguf_architectures
from trtllm_jax.text.tokenizer import Tokenizer

SECONDS = 1.0
TEXT = "ab a <s> 1 é🙂"

Read = Callable[[Path, bytes], None]


class Broken(Exception):
    """A reader did what no file may make it do."""


def run(read: Read, folder: Path, name: str, content: bytes) -> bool:
    """Whether `read` accepts `content` as the file `name` of `folder`; Broken where it does not refuse it either."""
    (folder / name).write_bytes(content)
    started = time.process_time()
    accepted = True
    try:
        read(folder, content)
    except ValueError as error:
        accepted = False
        _check_message(error, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | Broken):
            raise
        raise Broken(f"{name}: {type(error).__name__}: {error}\n{traceback.format_exc()}") from error
    taken = time.process_time() - started
    if taken > SECONDS:
        raise Broken(f"{name}: took {taken:.1f} s")
    return accepted


def _check_message(error: ValueError, folder: Path) -> None:
    message = str(error)
    named = str(folder) in message or "config.json" in message or "rope" in message or "tokenizer" in message
    fields = ("head_dim=", "num_attention_heads=", "architectures names")
    if not (named or message.startswith(fields)):
        raise Broken(f"the error names neither file nor field: {message!r}\n{traceback.format_exc()}")
    if len(message) > 3000 or "\0" in message:
        raise Broken(f"the error is no readable line: {message[:500]!r}")
    with _broken_if(UnicodeEncodeError, "the error cannot be printed"):
        message.encode()


@contextlib.contextmanager
def _broken_if(kind: type[Exception], problem: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise Broken(problem) from error


def read_safetensors(folder: Path, content: bytes) -> None:
    source = SafetensorsSource(folder)
    if b"-0" in content:  # an integer to Python, a fraction to Rust
        return
    with _broken_if(Exception, "safetensors refuses a file that we read"):
        theirs = dict(safetensors.deserialize(content))
    if theirs.keys() != source.info.keys():
        raise Broken(f"safetensors finds {sorted(theirs)}, we find {sorted(source.info)}")
    for name, tensor in theirs.items():
        ours = source.read(name, tuple(slice(None) for _ in source.info[name].shape))
        if (list(ours.shape), ours.tobytes()) != (tensor["shape"], bytes(tensor["data"])):
            raise Broken(f"safetensors reads other values or another shape of {name!r}")


def read_index(folder: Path, content: bytes) -> None:
    _read_everything(SafetensorsSource(folder))


def read_gguf(folder: Path, content: bytes) -> None:
    file = GgufFile(folder / "model.gguf", folder)
    stored = find_architecture(file, gguf_architectures())
    config = model_config(file, stored)
    generation_config(file)
    steps: list[Callable[[], object]] = [
        lambda: _read_everything(GgufSource(file, stored)),
        lambda: architecture(config).Config.from_hf(config).sizes,
        lambda: _use(Tokenizer(gguf_tokenizer.load_tokenizer(file))),
    ]
    refusals = []
    for step in steps:  # each, whatever the one before says
        try:
            step()
        except ValueError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def read_llama2c(folder: Path, content: bytes) -> None:
    file = Llama2cFile(folder / "model.bin")
    config = file.config()
    assert architecture(config).Config.from_hf(config).sizes["vocab"] == file.vocab_size
    _read_everything(file)


def read_llama2c_tokenizer(folder: Path, content: bytes) -> None:
    _use(Tokenizer(llama2c_tokenizer.load_tokenizer(folder / "tokenizer.bin")))


def read_config(folder: Path, content: bytes) -> None:
    stated = read_object(folder / "config.json")
    config = architecture(stated).Config.from_hf(stated)
    assert all(type(size) is int and size > 0 for size in config.sizes.values())


def read_tokenizer(folder: Path, content: bytes) -> None:
    _use(Tokenizer(hf_tokenizer.load_tokenizer(folder, use_fast=True)))


def _use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    for token in ids:
        tokenizer.piece(token)


def _read_everything(source: TensorSource) -> None:
    for name, info in source.info.items():
        part = source.read(name, tuple(slice(None) for _ in info.shape))
        if part.shape != info.shape or part.dtype.name != info.dtype:
            raise Broken(f"{name!r} is {part.shape} {part.dtype}, not as stated {info}")
