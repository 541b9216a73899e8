"""The tokenizer file of llama2.c: sentencepiece's pieces and scores.

Format: `Tokenizer.export` in https://github.com/karpathy/llama2.c/blob/master/tokenizer.py.
"""

import os
import re
import struct
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_tokenizer import load_tokenizer as load_gguf_tokenizer
from checkpoints.llama2c import BOS, EOS, SUFFIX
from checkpoints.regular_file import open_regular

MAX_BYTES = 64 << 20  # Llama 3's 128,256 tokens have 2 MB

_SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "\u2581"  # how sentencepiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def find_tokenizer_file(model: Path, vocab_size: int) -> Path | None:
    """The tokenizer file next to `model` under one of llama2.c's names; None if there is none."""
    named = (model.with_name(f"tok{vocab_size}{SUFFIX}"), model.with_name(f"tokenizer{SUFFIX}"))
    return next((path for path in named if path.is_file()), None)


def load_tokenizer(path: Path, vocab_size: int | None = None, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer in `path`; ValueError where it is damaged, or has not `vocab_size` tokens.

    With links resolved the file must be in `folder`; without one the user named the file itself.
    """
    scores, pieces = _read(path, folder)
    if vocab_size is not None and len(pieces) != vocab_size:
        raise ValueError(f"{path} has {len(pieces)} tokens and the model {vocab_size}; give the model's own tokenizer")
    return load_gguf_tokenizer(_AsGguf(path, scores, pieces))


class _AsGguf(GgufFile):
    """The vocabulary as the metadata of a GGUF file, which describes a sentencepiece model in the same way."""

    def __init__(self, path: Path, scores: list[float], pieces: list[str]) -> None:
        self.path = path
        kinds = [_BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else _NORMAL for piece in pieces]
        self.metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [_UNKNOWN, _CONTROL, _CONTROL, *kinds[3:]],
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.bos_token_id": BOS,
            "tokenizer.ggml.eos_token_id": EOS,
        }


def _read(path: Path, folder: Path | None) -> tuple[list[float], list[str]]:
    with open_regular(path, folder) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes; a llama2.c tokenizer has at most {MAX_BYTES}")
        content = file.read()
    damaged = ValueError(f"{path} is damaged or no llama2.c tokenizer")
    scores: list[float] = []
    pieces: list[str] = []
    offset = 4  # after the length of the longest piece
    while offset < len(content):
        if offset + 8 > len(content):
            raise damaged
        score, length = struct.unpack_from("<fi", content, offset)
        offset += 8 + length
        if length < 0 or offset > len(content):
            raise damaged
        try:
            pieces.append(content[offset - length : offset].decode().replace(" ", _SPACE))
        except UnicodeDecodeError as error:
            raise damaged from error
        scores.append(score)
    if len(pieces) < len(_SPECIAL):
        raise damaged
    # The file has these three as they are printed, with line breaks.
    pieces[: len(_SPECIAL)] = _SPECIAL
    return scores, pieces
