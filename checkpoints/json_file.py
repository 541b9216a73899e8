"""JSON from a checkpoint folder, which anyone may have written."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20  # the largest indexes of published models are about 10 MB


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError, naming the file, where it holds anything else or is too large."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; a checkpoint's JSON file may have at most {MAX_BYTES}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; it must be an object")
    return content
