"""A value from a file as an error shows it: short, on one line, whatever it is."""

import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlong = 60


def shown(value: Any) -> str:
    """`repr(value)` with the middle of long texts, and the inside of long or deep containers, left out."""
    return _REPR.repr(value)
