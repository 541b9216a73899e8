"""What a checkpoint holds twice: whether both are the same, compared a piece at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.pieces import contiguous_step, grid
from checkpoints.source import TensorInfo, TensorSource

Read = Callable[[tuple[slice, ...]], npt.NDArray[Any]]
"""Gives one part of a tensor, as `TensorSource.read` does."""

HEADS = (("lm_head.weight", "model.embed_tokens.weight"), ("head", "embed"))
"""The output head and the embeddings that it may be tied to: in Hugging Face's layout, and in ours as Orbax has it."""


def find_untied_head(source: TensorSource) -> tuple[str, str] | None:
    """The names of a head that is no copy of the embeddings, and of these; None where there is no such head.

    In our own layout a head is there only where a model has one.
    """
    for head, embeddings in HEADS:
        if head in source.info and embeddings in source.info:
            copied = head != "head" and _same_tensor(source, head, embeddings)
            return None if copied else (head, embeddings)
    return None


def equal_tensors(first: Read, second: Read, one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same shape and values, in whatever dtypes; ends with the first piece that differs.

    Those of one dtype are compared bit by bit, so that what is not a number equals itself.
    """
    if one.shape != other.shape:
        return False
    for window in grid(one.shape, contiguous_step(one.shape, np.dtype(one.dtype).itemsize)):
        index = tuple(slice(*part) for part in window)
        mine, yours = first(index), second(index)
        if mine.dtype == yours.dtype:
            if mine.tobytes() != yours.tobytes():
                return False
        elif not np.array_equal(mine.astype(np.float64), yours.astype(np.float64), equal_nan=True):
            return False
    return True


def _same_tensor(source: TensorSource, name: str, other: str) -> bool:
    return equal_tensors(
        lambda index: source.read(name, index),
        lambda index: source.read(other, index),
        source.info[name],
        source.info[other],
    )
