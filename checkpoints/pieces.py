"""Arrays in pieces that fit in memory, and casts to another dtype."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE_BYTES = 16 << 20
"""The size of a piece; reading and writing one may each take as much memory again."""

Window = tuple[tuple[int, int], ...]  # (start, stop) of every axis


def grid(shape: Sequence[int], step: Sequence[int]) -> Iterator[Window]:
    """The windows of at most `step` that cover `shape`, in C order."""
    along = [
        [(start, min(start + size, length)) for start in range(0, length, size)]
        for length, size in zip(shape, step, strict=True)
    ]
    return itertools.product(*along)


def contiguous_step(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape of windows of at most PIECE_BYTES that are contiguous in a C-ordered file."""
    step = [1] * len(shape)
    room = PIECE_BYTES // itemsize
    for axis in reversed(range(len(shape))):
        step[axis] = max(1, min(shape[axis], room))
        if step[axis] < shape[axis]:
            break
        room //= max(1, shape[axis])
    return tuple(step)


def chunk_shape(axes: Sequence[str], shape: Sequence[int], split: frozenset[str], itemsize: int) -> tuple[int, ...]:
    """Chunks of at most PIECE_BYTES, cut first along the axes in `split`, so that a mesh of up to 8 reads only its own.

    An axis that no number from 2 to 8 divides is cut only as far as PIECE_BYTES demands, and small arrays not at all.
    """
    chunk = [max(1, length) for length in shape]
    if math.prod(chunk) * itemsize > PIECE_BYTES // 16:
        for i, (axis, length) in enumerate(zip(axes, shape, strict=True)):
            if axis in split and length:
                chunk[i] = length // max(parts for parts in range(1, 9) if length % parts == 0)
    while math.prod(chunk) * itemsize > PIECE_BYTES:
        widest = chunk.index(max(chunk))
        chunk[widest] = -(-chunk[widest] // 2)
    return tuple(chunk)


def cast(values: npt.NDArray[Any], dtype: npt.DTypeLike, name: str) -> npt.NDArray[Any]:
    """`values` in `dtype`; ValueError, naming the tensor, where a finite value would become infinite."""
    if values.dtype == np.dtype(dtype):
        return values
    with np.errstate(over="ignore"):
        converted = values.astype(dtype)
    if np.isinf(converted).sum() != np.isinf(values).sum():
        raise ValueError(f"{name} has values that {np.dtype(dtype).name} cannot hold; choose bfloat16 or float32")
    return converted
