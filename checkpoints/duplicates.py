"""Tensors that a checkpoint holds twice, compared a piece at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.pieces import contiguous_step, grid
from checkpoints.source import TensorInfo, TensorSource

Read = Callable[[tuple[slice, ...]], npt.NDArray[Any]]
"""Reads one part of a tensor, as `TensorSource.read` does."""

HEADS = (("lm_head.weight", "model.embed_tokens.weight"), ("head", "embed"))
"""The names of the output head and of the embeddings that it may be tied to: Hugging Face's, and ours in Orbax."""


def find_untied_head(source: TensorSource) -> tuple[str, str] | None:
    """The names of an output head that differs from the embeddings, and of these; None where there is no such head.

    In our own layout a head is stored only if it is not tied.
    """
    for head, embeddings in HEADS:
        if head in source.info and embeddings in source.info:
            copied = head != "head" and _is_copy(source, head, embeddings)
            return None if copied else (head, embeddings)
    return None


def equal_tensors(first: Read, second: Read, first_info: TensorInfo, second_info: TensorInfo) -> bool:
    """Whether two tensors have the same shape and values, even in different dtypes; stops at the first difference.

    Tensors of the same dtype are compared bit by bit, so that NaN equals itself.
    """
    if first_info.shape != second_info.shape:
        return False
    for window in grid(first_info.shape, contiguous_step(first_info.shape, np.dtype(first_info.dtype).itemsize)):
        index = tuple(slice(*part) for part in window)
        one, other = first(index), second(index)
        if one.dtype == other.dtype:
            if one.tobytes() != other.tobytes():
                return False
        elif not np.array_equal(one.astype(np.float64), other.astype(np.float64), equal_nan=True):
            return False
    return True


def _is_copy(source: TensorSource, name: str, other: str) -> bool:
    return equal_tensors(
        lambda index: source.read(name, index),
        lambda index: source.read(other, index),
        source.info[name],
        source.info[other],
    )
