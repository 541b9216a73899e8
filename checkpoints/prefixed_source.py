"""Hugging Face's tensors of a model that was saved without its head, whose names lack a prefix."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt

from checkpoints.source import TensorInfo, TensorSource
from checkpoints.table import Weight


class PrefixedSource:
    """A `TensorSource` over another one in which "model.norm.weight" is "norm.weight"; names in `known` are kept."""

    def __init__(self, tensors: TensorSource, prefix: str, known: Iterable[str]) -> None:
        self._tensors = tensors
        known = set(known)
        self._names = {name if name in known else prefix + name: name for name in tensors.info}
        self.info: Mapping[str, TensorInfo] = {ours: tensors.info[name] for ours, name in self._names.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """One part of a tensor, as the other source reads it."""
        return self._tensors.read(self._names[name], index)


def with_prefix(source: TensorSource, rows: Iterable[Weight]) -> TensorSource:
    """The source under the names of the rows, should it have none with the prefix that most of them share."""
    names = [stored.name for row in rows for stored in row.stored]
    ((prefix, _),) = Counter(name.partition(".")[0] + "." for name in names).most_common(1)
    lacking = not any(name.startswith(prefix) for name in source.info)
    if lacking and any(prefix + name in names for name in source.info):
        return PrefixedSource(source, prefix, names)
    return source
