"""The extent of every logical axis, in the model and in the arrays on a mesh."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Repetition(NamedTuple):
    """Every index of `axis` is repeated `times` times in a row, each copy with its part of the axis `shared_by`."""

    axis: str
    shared_by: str
    times: int


@dataclass(frozen=True)
class Extents:
    """The extent of every logical axis; `extents[axis]` is the extent in the arrays on the mesh.

    ValueError if a padded extent is less than the axis' size.

    Attributes:
        sizes: the model's extents, as a checkpoint stores them.
        padded: the extents of the axes that are padded with zeros.
        repetitions: the axes whose indices are repeated.
    """

    sizes: Mapping[str, int]
    padded: Mapping[str, int] = field(default_factory=dict)
    repetitions: tuple[Repetition, ...] = ()

    def __post_init__(self) -> None:
        for axis, extent in self.padded.items():
            if axis in self.sizes and extent < self.sizes[axis]:
                raise ValueError(f"axis {axis!r} cannot be padded to {extent}: its size is {self.sizes[axis]}")

    def __getitem__(self, axis: str) -> int:
        for one in self.repetitions:
            if axis == one.axis:
                return self.sizes[axis] * one.times
            if axis == one.shared_by:
                return self.sizes[axis] // one.times
        return self.padded.get(axis, self.sizes[axis])

    def of_tensor(self, axes: Collection[str | int]) -> tuple[dict[str, int], dict[str, int]]:
        """The extents by which to read a stored tensor of these axes, and how often to repeat the indices of an axis.

        A tensor with both axes of a repetition is only reshaped: 4 heads of 8 queries are read as 16 heads of 2, in the
        same order. A tensor with the repeated axis alone is repeated along it.
        """
        sizes = dict(self.sizes)
        times = {}
        for one in self.repetitions:
            if one.shared_by in axes:
                sizes[one.axis] *= one.times
                sizes[one.shared_by] //= one.times
            elif one.axis in axes:
                times[one.axis] = one.times
        return sizes, times
