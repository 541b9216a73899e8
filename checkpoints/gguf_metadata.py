"""The metadata that a GGUF file states of its architecture, checked value by value."""

from typing import Any

import numpy as np

from checkpoints.error_text import short_repr
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_header import REMEDY


class ArchitectureMetadata:
    """The values under the architecture's own prefix: "block_count" is "llama.block_count"."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._prefix = file.metadata["general.architecture"]

    def get(self, key: str) -> Any:
        """The value as the file has it; None where it states none."""
        return self._file.metadata.get(f"{self._prefix}.{key}")

    def count(self, key: str, *, default: int | None = None, minimum: int = 1) -> int:
        """An integer from `minimum` to 2**31 - 1; ValueError otherwise, or where there is neither one nor a default."""
        value = self._value(key, default)
        if type(value) is not int or not minimum <= value < 2**31:
            raise ValueError(
                f"{self._file.path}: '{self._prefix}.{key}' is {short_repr(value)}; it must be a whole number of at "
                f"least {minimum}. {REMEDY}"
            )
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A number above 0; ValueError otherwise, or where there is neither one nor a default."""
        value = self._value(key, default)
        # The bounds are those of float32, in which metadata is stored. NaN is in no range.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-38 < value < 1e38:
            raise ValueError(
                f"{self._file.path}: '{self._prefix}.{key}' is {short_repr(value)}; it must be a number above 0. "
                f"{REMEDY}"
            )
        # 1e-5 in float32 would come out as 9.999999747378752e-06.
        return float(str(np.float32(value)))

    def count_or_number(self, key: str) -> int | float:
        """An integer where the file states an integer, else a number above 0; ValueError otherwise."""
        return self.count(key, minimum=0) if type(self.get(key)) is int else self.number(key)

    def _value(self, key: str, default: float | None) -> Any:
        value = self.get(key)
        return default if value is None else value
