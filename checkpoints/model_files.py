"""Writes the files that accompany a model's weights: configuration, tokenizer, licence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.checkpoint import Checkpoint
from checkpoints.error_text import short_repr
from checkpoints.json_file import read_object
from checkpoints.regular_file import open_regular
from checkpoints.rope_factors import as_llama3

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md")
_OF_MODULES = "[0-9]*_*/*.json"
"""How sentence-transformers pools: modules.json names these folders."""
_NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
_WEIGHT_FILES = ("*.index.json",)
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.model",
    "*.jinja",
)  # fmt: skip


def write_model_files(
    checkpoint: Checkpoint, folder: Path, *, dtype: str, cast: bool, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """The configuration and the tokenizer, as a Hugging Face folder has them.

    A folder's own files are copied as they are, those of the tokenizer only where no `tokenizer` is given to save. Only
    if the weights were `cast` does config.json then name `dtype` instead of what it did, and only if they have a
    head that it denied does it say so. ValueError where a file is a link that leaves the folder and the hub's cache.
    """
    if checkpoint.path.is_dir():
        left_out = _WEIGHT_FILES if tokenizer is None else (*_WEIGHT_FILES, *_TOKENIZER_FILES)
        for path in sorted(checkpoint.path.iterdir()):
            if not path.is_dir() and _matches(path.name, _COPIED) and not _matches(path.name, left_out):
                _copy(checkpoint.path, path, folder)
        below = [_OF_MODULES] if tokenizer is not None else [_OF_MODULES, _NAMED_TEMPLATES]
        for path in sorted(path for pattern in below for path in checkpoint.path.glob(pattern)):
            _copy(checkpoint.path, path, folder / path.parent.name)
        config = _with_dtype(checkpoint.config, dtype) if cast else checkpoint.config
        if config != read_object(folder / CONFIG):
            _write(folder / CONFIG, config)
    else:
        _write(folder / CONFIG, as_llama3(checkpoint.config) | {"dtype": dtype})
        _write(folder / GENERATION_CONFIG, _with_turn_ends(checkpoint))
    if tokenizer is not None:
        _check_template_names(checkpoint, tokenizer)
        tokenizer.save_pretrained(folder)


def _copy(root: Path, path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with open_regular(path, root) as source, (folder / path.name).open("xb") as copy:
        shutil.copyfileobj(source, copy)


def _with_turn_ends(checkpoint: Checkpoint) -> dict[str, Any]:
    stated = checkpoint.generation_config.get("eos_token_id") or []
    ends = dict.fromkeys([*(stated if isinstance(stated, list) else [stated]), *sorted(checkpoint.turn_ends)])
    return checkpoint.generation_config | ({"eos_token_id": list(ends)} if checkpoint.turn_ends else {})


def _check_template_names(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where a template's name is no valid file name, since transformers writes a file for each."""
    templates = tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else ():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w .-]*", name):
            raise ValueError(
                f"{checkpoint.path}: the tokenizer has a chat template with the name {short_repr(name)}, which is no "
                "file's name: rename it, or give another tokenizer"
            )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    text = config.get("text_config")
    return config | {key: dtype} | ({"text_config": text | {key: dtype}} if isinstance(text, dict) else {})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
