"""Reads any box of one of our arrays from the stored tensors that it consists of."""

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.source import TensorSource
from checkpoints.table import Block


def read_shard(
    axes: tuple[str, ...],
    places: tuple[Block, ...],
    source: TensorSource,
    window: tuple[tuple[int, int], ...],
    dtype: npt.DTypeLike,
) -> npt.NDArray[Any]:
    """The part of our array in `window`, a (start, stop) per axis, as a new array; zero outside all blocks."""
    shard = np.zeros([stop - start for start, stop in window], dtype)
    for block in places:
        target, wanted = [], {}
        for axis, (start, stop) in zip(axes, window, strict=True):
            span = block.span(axis)
            first, last = max(start, span.start), min(stop, span.stop)
            target.append(slice(first - start, last - start))
            wanted[axis] = range(first - span.start, last - span.start)
        if all(wanted.values()):
            shard[tuple(target)] = _read_repeated(axes, block, source, wanted)
    return shard


def _read_repeated(
    axes: tuple[str, ...], block: Block, source: TensorSource, wanted: dict[str, range]
) -> npt.NDArray[Any]:
    """The `wanted` part of one block, in which the indices along the axes in `block.times` are repeated."""
    stored = dict(wanted)
    for axis, times in block.times.items():
        stored[axis] = range(wanted[axis].start // times, -(-wanted[axis].stop // times))
    part = _read_block(axes, block, source, stored)
    for axis, times in block.times.items():
        index = np.arange(wanted[axis].start, wanted[axis].stop) // times - stored[axis].start
        part = part.take(index, axes.index(axis))
    return part


def _read_block(
    axes: tuple[str, ...], block: Block, source: TensorSource, wanted: dict[str, range]
) -> npt.NDArray[Any]:
    """The `wanted` part of one stored tensor, its axes in our order.

    Each stored dimension is read as one slice along the outermost axis of its group of which more than one index is
    wanted, and the axes inside that are cut after it: outermost is where a layout is sharded.
    """
    index: list[slice] = []
    grouped: list[int] = []
    cut: list[slice] = []
    for group in block.dims:
        several = next((i for i, axis in enumerate(group) if len(wanted[axis]) > 1), len(group) - 1)
        outer, inner = group[: several + 1], group[several + 1 :]
        stride = math.prod(block.size[axis] for axis in inner)
        start = 0
        for axis in outer:
            start = start * block.size[axis] + wanted[axis].start
        index.append(slice(start * stride, (start + len(wanted[outer[-1]])) * stride))
        grouped += [*(len(wanted[axis]) for axis in outer), *(block.size[axis] for axis in inner)]
        cut += [*(slice(None) for _ in outer), *(slice(wanted[axis].start, wanted[axis].stop) for axis in inner)]
    if block.offset:
        index[0] = slice(index[0].start + block.offset, index[0].stop + block.offset)
    part = source.read(block.name, tuple(index)).reshape(grouped)[tuple(cut)]
    stored_order = list(itertools.chain(*block.dims))
    ours = part.transpose([stored_order.index(axis) for axis in axes if axis in stored_order])
    return ours.reshape([len(wanted[axis]) for axis in axes])
