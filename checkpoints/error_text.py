"""Values and texts of untrusted files in error messages: short and on one line."""

import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlong = 60


def short_repr(value: Any) -> str:
    """`repr(value)`, with the middle of long texts and the content of long or deep containers abbreviated."""
    return _REPR.repr(value)


def one_line(text: str, max_length: int = 500) -> str:
    """The first `max_length` characters of a text, with spaces in place of unprintable ones."""
    return "".join(c if c.isprintable() else " " for c in text[:max_length])
