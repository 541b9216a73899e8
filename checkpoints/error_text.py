"""Values and texts from a file as an error shows them: short, on one line, whatever they are."""

import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlong = 60


def short_repr(value: Any) -> str:
    """`repr(value)` with the middle of long texts, and the inside of long or deep containers, left out."""
    return _REPR.repr(value)


def one_line(text: str, most: int = 500) -> str:
    """The first `most` characters of a text, with spaces for what cannot be printed."""
    return "".join(c if c.isprintable() else " " for c in text[:most])
