"""A model on disk: configuration, tensors and tokenizer, from a folder, a GGUF file or a llama2.c file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.formats import check_folder, is_llama2c_file, open_gguf, warn_of_other_formats
from checkpoints.gguf_architecture import GgufArchitecture, find_architecture
from checkpoints.hub import locate
from checkpoints.json_file import read_object
from checkpoints.orbax_folder import find_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from checkpoints.gguf_file import GgufFile
    from checkpoints.llama2c import Llama2cFile
    from checkpoints.source import TensorSource

TOKENIZER_MODES = ("auto", "slow")

logger = logging.getLogger("trtllm_jax")


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration in Hugging Face's form, and on demand its tensors and tokenizer.

    At most one of `gguf`, `llama2c` and `orbax` is set; without them the weights are safetensors.

    Attributes:
        name: what the user asked for.
        path: the folder or file.
        stated_config: the configuration that the model states in Hugging Face's form; {} for a GGUF file.
        generation_config: {} where there is none.
        token: for further downloads of the same model.
        gguf: the file that holds everything.
        gguf_architectures: the architectures that are read from GGUF files.
        llama2c: the file that holds everything but the tokenizer.
        orbax: the folder of the arrays.
    """

    name: str
    path: Path
    stated_config: dict[str, Any]
    generation_config: dict[str, Any]
    token: str | None = field(default=None, repr=False)
    gguf: GgufFile | None = field(default=None, repr=False)
    gguf_architectures: tuple[GgufArchitecture, ...] = field(default=(), repr=False)
    llama2c: Llama2cFile | None = field(default=None, repr=False)
    orbax: Path | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration in the form of config.json.

        A GGUF file's is made of its metadata; ValueError where its architecture is not among those that are read.
        """
        if self.gguf is None:
            return self.stated_config
        from checkpoints.gguf_config import model_config

        return model_config(self.gguf, find_architecture(self.gguf, self.gguf_architectures))

    @cached_property
    def tensors(self) -> TensorSource:
        """The weights, of which only the headers are read yet. ValueError where there are none, or damaged ones.

        Their names are Hugging Face's. Only Orbax folders hold arrays in our layout, under the paths of our parameters;
        `load.as_hugging_face` converts them.
        """
        if self.orbax is not None:
            from checkpoints.orbax_source import OrbaxSource

            return OrbaxSource(self.orbax)
        if self.gguf is not None:
            from checkpoints.gguf_source import GgufSource

            return GgufSource(self.gguf, find_architecture(self.gguf, self.gguf_architectures))
        if self.llama2c is not None:
            return self.llama2c
        from checkpoints.safetensors_source import SafetensorsSource

        return SafetensorsSource(self.path)

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """The end-of-turn ids of a GGUF file, recognised by the names of their tokens.

        As in llama.cpp they end any sequence, because converters often state one end-of-sequence id only. A Hugging
        Face folder states all of its ids, so there it is empty.
        """
        if self.gguf is None:
            return frozenset()
        from checkpoints.gguf_chat import turn_ends

        return frozenset(turn_ends(self.gguf).values())

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """A context in which a ValueError about the `config` or the tensors says which folder or file it came from."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def resolve_tied_head(self) -> Checkpoint:
        """The checkpoint with a `config` that unties the output head if the weights hold a separate one.

        As in transformers from version 5 on, a stored head that differs from the embeddings is used even where the
        configuration ties it; merged adapters produce such checkpoints.
        """
        stored = self.orbax is not None or (self.path.is_dir() and any(self.path.glob("*.safetensors")))
        if self.gguf is not None or not stored or self.config.get("tie_word_embeddings") is not True:
            return self
        if "ForSequenceClassification" in str(self.config.get("architectures")):
            return self  # the rows of its head are classes, which are tied to no tokens
        from checkpoints.duplicates import find_untied_head

        found = find_untied_head(self.tensors)
        if found is None:
            return self
        logger.warning(
            "%s: config.json ties the output head to the embeddings, but the weights hold one of its own, %r beside "
            "%r, which is used. Set tie_word_embeddings to false, or remove the tensor that is not meant",
            self.path,
            *found,
        )
        return replace(self, stated_config=self.config | {"tie_word_embeddings": False})

    def load_tokenizer(
        self, path_override: str | Path | None = None, tokenizer_mode: str = "auto", revision: str | None = None
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint, or of `path_override`: a folder, a GGUF or llama2.c file or a hub name.

        `revision` applies to hub names, the checkpoint's own included. No code of a checkpoint is ever run.
        """
        if tokenizer_mode not in TOKENIZER_MODES:
            raise ValueError(f"tokenizer_mode is {tokenizer_mode!r}; it must be one of {TOKENIZER_MODES}")
        path, gguf = self.path, self.gguf
        if path_override is not None or revision is not None:
            path = locate(path_override or self.name, revision=revision, token=self.token, weights=False)
            gguf = None if is_llama2c_file(path) else open_gguf(path)
        if is_llama2c_file(path):
            return self._llama2c_tokenizer(path)
        if gguf is not None:
            from checkpoints import gguf_tokenizer

            return gguf_tokenizer.load_tokenizer(gguf)
        from checkpoints import hf_tokenizer

        return hf_tokenizer.load_tokenizer(path, use_fast=tokenizer_mode == "auto")

    def _llama2c_tokenizer(self, path: Path) -> PreTrainedTokenizerBase:
        from checkpoints.llama2c_tokenizer import find_tokenizer_file, load_tokenizer

        if self.llama2c is None:
            return load_tokenizer(path)
        if path != self.path:
            return load_tokenizer(path, self.llama2c.vocab_size)
        found = find_tokenizer_file(path, self.llama2c.vocab_size)
        if found is None:
            names = f"tokenizer.bin or tok{self.llama2c.vocab_size}.bin"
            raise ValueError(f"{path} has no {names} beside it; give the tokenizer's own path")
        return load_tokenizer(found, self.llama2c.vocab_size, path.parent)


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    weights: bool = True,
    gguf_architectures: Iterable[GgufArchitecture] = (),
) -> Checkpoint:
    """The checkpoint that `model` names: a Hugging Face or Orbax folder, a GGUF or llama2.c file, else a hub name.

    ValueError names what is missing or cannot be read, and the remedy.

    Args:
        model: a path or a hub name.
        revision: of a hub name.
        token: for the hub.
        weights: whether they are downloaded, or only the configuration and the tokenizer.
        gguf_architectures: those that are read from GGUF files, as `trtllm_jax.models.gguf_architectures` gives them. A
            GGUF file of another architecture has a tokenizer, but neither a configuration nor tensors.
    """
    path = locate(model, revision=revision, token=token, weights=weights)
    if path.is_dir():
        warn_of_other_formats(path)
    if is_llama2c_file(path):
        from checkpoints.llama2c import Llama2cFile

        llama2c = Llama2cFile(path)
        return Checkpoint(str(model), path, llama2c.config(), llama2c.generation_config(), token, llama2c=llama2c)
    gguf = open_gguf(path)
    if gguf is not None:
        from checkpoints.gguf_config import generation_config

        known = tuple(gguf_architectures)
        return Checkpoint(str(model), gguf.path, {}, generation_config(gguf), token, gguf, known)
    orbax = None if any(path.glob("*.safetensors")) else find_arrays(path)
    check_folder(path, orbax)
    generation = path / "generation_config.json"
    checkpoint = Checkpoint(
        str(model),
        path,
        read_object(path / "config.json"),
        read_object(generation) if os.path.lexists(generation) else {},
        token,
        orbax=orbax,
    )
    return checkpoint.resolve_tied_head() if weights else checkpoint
