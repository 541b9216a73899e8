"""One call of a compiled program as data: which program, and what the host sends it.

A step is a list of these and nothing else: whoever has the list, another host or a recording, can run the same step.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

Key = tuple[Hashable, ...]
"""A program's name, then its variant: the sizes and choices that it is compiled for."""


def size_of(key: Key) -> int:
    """The rows, or tokens of a ragged step, that a key's variant begins with."""
    size = key[1]
    assert isinstance(size, int)
    return size


@dataclass(frozen=True, eq=False)
class Dispatch:
    """One call of the program `key`.

    Attributes:
        key: in the engine's table of programs.
        inputs: the host's arrays by name. One that is left out has its default, which the device has already.
    """

    key: Key
    inputs: Mapping[str, np.ndarray]
