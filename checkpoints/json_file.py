"""JSON files of a checkpoint, whose author is not trusted."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from checkpoints.error_text import short_repr
from checkpoints.regular_file import open_regular

MAX_BYTES = 32 << 20  # the largest indexes of published models are about 15 MB; values take up to 25 times their text


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError, naming the file, where it holds anything else or is too large.

    With links resolved the file must be in its folder or in the hub's cache.
    """
    value = read_value(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; it must be an object")
    return value


def read_value(path: Path) -> Any:
    """The JSON value in `path`; otherwise as `read_object`."""
    with open_regular(path, path.parent) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes; a checkpoint's JSON file may have at most {MAX_BYTES}")
        content = file.read()
    try:
        return decode(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Download or convert the model again") from error


def decode(content: bytes) -> Any:
    """The value of UTF-8 JSON text; ValueError where it is invalid, nested too deeply, or has a key twice."""
    try:
        text = str(content, "utf-8-sig")
        value = json.loads(text, object_pairs_hook=_object)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()  # fails where half of a surrogate pair stands alone
        return value
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object; duplicate keys are refused because readers disagree about their value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short_repr(twice)} is there twice; remove one")
    return content
