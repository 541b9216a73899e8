"""The tokenizer of a Hugging Face folder, loaded by transformers after its files are checked."""

import itertools
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from checkpoints.error_text import short_repr
from checkpoints.json_file import read_object
from checkpoints.regular_file import check_regular
from checkpoints.rust_errors import as_value_error

MAX_BYTES = 256 << 20  # the largest tokenizers of published models are about 40 MB

# What transformers may open, chat templates included.
_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "additional_chat_templates/*.jinja")

_REMEDY = (
    "Check the tokenizer's files, or give the folder or hub name of another tokenizer; code that a tokenizer brings is "
    "never run"
)


def load_tokenizer(folder: Path, *, use_fast: bool) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; ValueError where there is none that loads. No code of the folder is run.

    With links resolved the tokenizer's files must be in the folder or in the hub's cache.
    """
    _check_files(folder)
    config = _config(folder)
    with as_value_error(folder, "has no tokenizer that transformers can load", _REMEDY):
        return AutoTokenizer.from_pretrained(
            folder, config=config, use_fast=use_fast, trust_remote_code=False, local_files_only=True
        )


def _check_files(folder: Path) -> None:
    for path in itertools.chain.from_iterable(folder.glob(pattern) for pattern in _PATTERNS):
        if path.is_dir():
            continue
        size = check_regular(path, folder).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes; a tokenizer's file may have at most {MAX_BYTES}")
    stated = folder / "tokenizer_config.json"
    if not os.path.lexists(stated):
        return
    versions = read_object(stated).get("fast_tokenizer_files", [])
    if not isinstance(versions, list) or not all(isinstance(v, str) and Path(v).name == v for v in versions):
        raise ValueError(
            f"{stated} has fast_tokenizer_files={short_repr(versions)}; it must list names of its own folder"
        )


def _config(folder: Path) -> Any:
    """A configuration with those fields of config.json that select the tokenizer's class.

    Configuration classes act on the other fields too, which may be hostile: one could ask for a billion labels.
    """
    path = folder / "config.json"
    stated = read_object(path) if os.path.lexists(path) else {}
    try:
        config = AutoConfig.for_model(stated.get("model_type"))
    except Exception:  # the model type has no class, or its class has no default
        config = PreTrainedConfig()
    config._name_or_path = str(folder)
    if isinstance(tokenizer_class := stated.get("tokenizer_class"), str):
        config.tokenizer_class = tokenizer_class
    return config
