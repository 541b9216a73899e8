"""StepEdits that keep enough of a file's structure for a reader to come to what was changed."""

from __future__ import annotations

import contextlib
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES = (
    *_NUMBERS, 10**18, 10**400, 0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, None, True, False, "", "a",
    "F32", "F4", "\ud800", "\0", "../up", "/", "x" * 5000, "é🙂", [], {}, [[]], [None], {"": {}}, "LlamaTokenizer",
)  # fmt: skip


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """One place of the value changed, or of the bytes where they are no JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    if rng.random() < 0.05:
        return _odd_text(data, rng)
    with contextlib.suppress(RecursionError):
        return json.dumps(_changed(value, rng)).encode()
    return mutate_bytes(data, rng)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header or the tensors' bytes changed, most often with a true length before the header."""
    if len(data) < 8:
        return mutate_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    header = mutate_json(header, rng)
    if rng.random() < 0.2:
        rest = mutate_bytes(rest, rng)
    length = rng.choice(_NUMBERS) % 2**64 if rng.random() < 0.05 else len(header)
    return length.to_bytes(8, "little") + header + rest


def mutate_gguf(data: bytes, rng: random.Random) -> bytes:
    """A number of the header, or a text with its length, changed; else bytes."""
    choice = rng.random()
    if choice < 0.5:
        width = rng.choice((1, 4, 8))
        at = rng.randrange(max(len(data) - width, 1))
        number = rng.choice(_NUMBERS) % 2 ** (8 * width)
        return data[:at] + number.to_bytes(width, "little") + data[at + width :]
    strings = _gguf_strings(data)
    if choice < 0.8 and strings:
        at, length = rng.choice(strings)
        other_at, other_length = rng.choice(strings)
        replacement = rng.choice(
            [data[other_at + 8 : other_at + 8 + other_length], b"", b"\xff", b"x" * 300, b"<0x00>", b"$A", b"a:b"]
        )
        return data[:at] + struct.pack("<Q", len(replacement)) + replacement + data[at + 8 + length :]
    return mutate_bytes(data, rng)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A piece cut, doubled, overwritten or put in."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    end = min(end, start + rng.choice((1, 4, 8, 32, len(data))))
    noise = rng.randbytes(rng.choice((1, 4, 8)))
    change: Callable[[], bytes] = rng.choice(
        [
            lambda: data[:start] + data[end:],
            lambda: data[:end] + data[start:],
            lambda: data[:start] + noise + data[start + len(noise) :],
            lambda: data[:start] + noise + data[start:],
            lambda: data[:start],
        ]
    )
    return change()


def _changed(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one place of it replaced, removed or repeated."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return _number_near(value, rng) if rng.random() < 0.3 else rng.choice(_VALUES)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    copied: Any = value.copy()
    choice = rng.random()
    if choice < 0.1:
        del copied[key]
    elif choice < 0.2 and isinstance(value, dict):
        copied[rng.choice(["", "__metadata__", "num_labels", "auto_map", "type", *value])] = value[key]
    elif choice < 0.2:
        copied.append(value[key])
    else:
        copied[key] = _changed(value[key], rng)
    return copied


def _number_near(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, -value, value << 32))
    return -value if isinstance(value, float) else rng.choice(_NUMBERS)


def _odd_text(data: bytes, rng: random.Random) -> bytes:
    """JSON as no writer writes it: a key twice, deep nesting, other encodings, endless digits."""
    return rng.choice(
        [
            data.replace(b"{", b'{"a": 1, "a": 2, ', 1),
            data.replace(b": ", b": " + b"[" * 2000, 1),
            data.replace(b": ", b": " + b'{"a":' * 300 + b"1" + b"}" * 300 + b', "z": ', 1),
            data.replace(b": ", b": " + b"9" * 5000 + b', "z": ', 1),
            b"\xef\xbb\xbf" + data,
            data.decode("utf-8", "replace").encode("utf-16"),
            b" " + data,
            data + b" ",
            data.replace(b'"', b"'"),
        ]
    )


def _gguf_strings(data: bytes) -> list[tuple[int, int]]:
    """(where its length stands, its length) of whatever looks like a text with its length."""
    found = []
    for at in range(24, min(len(data), 4000) - 8):
        length = int.from_bytes(data[at : at + 8], "little")
        if 0 < length < 100 and data[at + 8 : at + 8 + length].isascii() and data[at + 8] >= 32:
            found.append((at, length))
    return found
