"""The interface of all checkpoint formats: tensors under Hugging Face names, any part of which can be read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes  # noqa: F401 - so that numpy knows the names of its dtypes
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape and the numpy name of the dtype that reading it gives ("bfloat16" from ml_dtypes)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """The size of the whole tensor in that dtype."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class TensorSource(Protocol):
    """The tensors of one checkpoint. Reading is safe from several threads."""

    @property
    def info(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by its Hugging Face name."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """One part of a tensor, a slice (step 1) per dimension; only that part is read from the file.

        Returns the stored dtype, or float32 where the file holds quantised blocks. The result may be a read-only view
        of the file, which must be copied to outlive the source.
        """
        ...
