"""Which ids occurred in one sequence, and how often each counts for its penalties."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Occurred(NamedTuple):
    """Ids int32 [n], each once, and how often each counts, float32 [n]; views that the next token changes."""

    ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.float32]


class Occurrences:
    """StepOutput up to date by what is new only: a sequence is asked about before each of its tokens."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.zeros(0, np.int32)
        self._counts = np.zeros(0, np.float32)
        self._generated: int | None = None

    def of(self, prompt: Sequence[int], generated: Sequence[int], ignored: int) -> Occurred:
        """Of one sequence, always the same; the prompt's first `ignored` ids occurred and count nothing."""
        if self._generated is None:
            self._read_prompt(np.asarray(prompt, np.int32), ignored)
        for token in generated[self._generated :]:
            self._count(token)
        self._generated = len(generated)
        known = len(self._places)
        return Occurred(self._ids[:known], self._counts[:known])

    def _read_prompt(self, prompt: npt.NDArray[np.int32], ignored: int) -> None:
        self._generated = 0
        self._ids, place = np.unique(prompt, return_inverse=True)
        self._counts = np.bincount(place[ignored:], minlength=self._ids.size).astype(np.float32)
        self._places = {token: index for index, token in enumerate(self._ids.tolist())}

    def _count(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == self._ids.size:
            more = max(64, place)
            self._ids = np.append(self._ids, np.zeros(more, np.int32))
            self._counts = np.append(self._counts, np.zeros(more, np.float32))
        self._ids[place] = token
        self._counts[place] += 1
