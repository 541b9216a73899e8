"""Hugging Face's tensors, read from arrays in our own layout."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.fit import require_fit
from checkpoints.source import TensorInfo, TensorSource
from checkpoints.table import Block, Sizes, Weight, blocks, shape, stored_shapes
from sharding import Extents


class PackedSource:
    """A `TensorSource` over another one that holds our arrays, unpadded, under their paths.

    ValueError lists every array that is missing, unused or of another shape than the expanded rows say.
    """

    def __init__(self, arrays: TensorSource, rows: Iterable[Weight], sizes: Sizes) -> None:
        self._arrays = arrays
        self._places: dict[str, list[tuple[Weight, Block]]] = {}
        self.info: Mapping[str, TensorInfo] = {}
        rows, stored = tuple(rows), Extents(sizes)
        require_fit({row.path: shape(row, stored) for row in rows}, arrays.info)
        for row in rows:
            for block in blocks(row, stored):
                self._places.setdefault(block.name, []).append((row, block))
        self.info = {
            name: TensorInfo(stored_shapes(block for _, block in parts)[name], arrays.info[parts[0][0].path].dtype)
            for name, parts in self._places.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """One part of a tensor, cut from the smallest box of our array that contains it."""
        places = self._places[name]
        if len(places) == 1:
            return self._read_part(*places[0], index)
        start, stop, _ = index[0].indices(self.info[name].shape[0])
        parts = []
        for row, block in places:
            end = block.stored_shape[0]
            of_part = slice(*(min(max(at - block.offset, 0), end) for at in (start, stop)))
            parts.append(self._read_part(row, block, (of_part, *index[1:])))
        return np.concatenate(parts)

    def _read_part(self, row: Weight, block: Block, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """One part of the tensor, or of the part of it, that a block holds."""
        wanted: dict[str, range] = {axis: range(block.size[axis]) for axis in row.axis_names}
        cut = []
        for group, length, part in zip(block.dims, block.stored_shape, index, strict=True):
            start, stop, _ = part.indices(length)
            ranges, inside = _covering([block.size[axis] for axis in group], start, max(start, stop))
            wanted |= dict(zip(group, ranges, strict=True))
            cut.append(inside)
        box = tuple(
            slice(block.start[axis] + wanted[axis].start, block.start[axis] + wanted[axis].stop)
            for axis in row.axis_names
        )
        stored_order = list(itertools.chain(*block.dims))
        absent = [axis for axis in row.axis_names if axis not in stored_order]
        values = self._arrays.read(row.path, box)
        ordered = values.transpose([row.axis_names.index(axis) for axis in (*absent, *stored_order)])
        return ordered.reshape([math.prod(len(wanted[axis]) for axis in group) for group in block.dims])[tuple(cut)]


def _covering(sizes: Sequence[int], start: int, stop: int) -> tuple[list[range], slice]:
    """The smallest box of an array of `sizes` that contains the flat range `start` to `stop`, and the range in it."""
    ranges: list[range] = []
    for i in range(len(sizes)):
        stride = math.prod(sizes[i + 1 :])
        ranges.append(range(start // stride, -(-stop // stride)))
        start, stop = start - ranges[-1].start * stride, stop - ranges[-1].start * stride
        if len(ranges[-1]) != 1:
            return [*ranges, *map(range, sizes[i + 1 :])], slice(start, stop)
    return ranges, slice(start, stop)
