"""The parameter table: one row states a weight once; shapes, placement and both conversions are derived from it."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from pallas_kernels.weights import Format, QuantizedWeight
from sharding import Extents, ShardingRules

Sizes = Mapping[str, int]
Params = Any  # a pytree: dicts, and tuples of dicts where a path has a number


@dataclass(frozen=True)
class Stored:
    """One tensor of a Hugging Face checkpoint, a part of one, or a family of them.

    `name` may hold `{i}`, the layer, and `{axis}`: then there is one tensor for each index of that logical axis
    ("experts.{experts}.w1.weight"), and the axis is not part of the layout; several axes are counted through, the last
    one fastest ("norms.{kv_heads group}.weight"). `layout` lists the stored dimensions, each
    a logical axis or a parenthesised group of them, outermost first. `size` is the extent along the row's fused axis: a
    name in the sizes or a number; with size 1 the layout may leave that axis out.

    Several of one row that have the same name are the parts of one tensor, in order along its first stored dimension:
    a `qkv_proj.weight` in which all the queries are followed by all the keys and all the values.
    """

    name: str
    layout: str
    size: str | int = 1

    @property
    def dims(self) -> tuple[tuple[str, ...], ...]:
        """The logical axes of each stored dimension: "(heads head_dim) embed" is ((heads, head_dim), (embed,))."""
        dims = re.findall(r"\(([^()]*)\)|(\S+)", self.layout)
        return tuple(tuple((group or single).split()) for group, single in dims)

    @property
    def indexed(self) -> tuple[str, ...]:
        """The logical axes that choose a tensor by its name."""
        return tuple(itertools.chain(*(group.split() for group in self._numbers)))

    def name_of(self, index: Sizes, size: Sizes) -> str:
        """The name of the tensor at an index along the axes in `indexed`, whose extents `size` has."""

        def number(group: str) -> int:
            return reduce(lambda count, axis: count * size[axis] + index[axis], group.split(), 0)

        return self.name.format(**{group: number(group) for group in self._numbers})

    @property
    def _numbers(self) -> list[str]:
        """What the name counts, in the order of the name."""
        return [group for group in re.findall(r"{([\w ]+)}", self.name) if group != "i"]


@dataclass(frozen=True)
class Weight:
    """One weight of the model: where it is in the parameters, its logical axes, and the tensors it is made of.

    `path` "layers.{i}.qkv" is `params["layers"][i]["qkv"]`. With several stored tensors, `fuse` names the axis along
    which they are concatenated, in order. `dtype` is the weight's own; None for the one that the model is loaded in.
    With a `format` the weight is a `QuantizedWeight`, whose scales are those of all but the last `inputs` axes.
    """

    path: str
    axes: str
    stored: tuple[Stored, ...]
    fuse: str | None = None
    dtype: str | None = None
    format: Format | None = None
    inputs: int = 1

    def __post_init__(self) -> None:
        if len(self.stored) != 1 and self.fuse is None:
            raise ValueError(f"weight {self.path!r} has {len(self.stored)} stored tensors: name the axis to fuse")
        if self.fuse is not None and self.fuse not in self.axis_names:
            raise ValueError(
                f"weight {self.path!r} fuses along {self.fuse!r}, which is not among its axes {self.axes!r}"
            )
        for stored in self.stored:
            named = [*itertools.chain(*stored.dims), *stored.indexed]
            if self.fuse is not None and stored.size == 1 and self.fuse not in named:
                named.append(self.fuse)
            if sorted(named) != sorted(self.axis_names):
                raise ValueError(
                    f"weight {self.path!r} has the axes {self.axes!r}, but {stored.name!r} states {stored.layout!r}: "
                    "each axis must be there exactly once"
                )
        for name in {stored.name for stored in self.stored}:
            if len({stored.dims[1:] for stored in self.stored if stored.name == name}) > 1:
                raise ValueError(f"weight {self.path!r} has parts of {name!r} that differ behind the first dimension")

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The logical axes, one per dimension of our array."""
        return tuple(self.axes.split())


class Block(NamedTuple):
    """The location of one stored tensor in our array: `start` and `size` along every axis, without padding.

    Along the axes in `times` each stored index is repeated so many times. Of a tensor in several parts this is the one
    that begins at index `offset` of its first dimension.
    """

    name: str
    dims: tuple[tuple[str, ...], ...]
    start: Sizes
    size: Sizes
    times: Sizes
    offset: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, or the part, in the checkpoint."""
        return tuple(math.prod(self.size[axis] for axis in group) for group in self.dims)

    def span(self, axis: str) -> range:
        """The indices of our array along `axis` whose first is the tensor's 0, the next its 1, and so on."""
        times = self.times.get(axis, 1)
        return range(self.start[axis], self.start[axis] + self.size[axis] * times, times)


def expand(table: Iterable[Weight], num_layers: int) -> tuple[Weight, ...]:
    """The rows with every `{i}` written out, layer by layer; rows without one are kept as they are."""
    rows: list[Weight] = []
    for row in table:
        if "{i}" not in row.path:
            rows.append(row)
        else:
            rows.extend(_of_layer(row, str(layer)) for layer in range(num_layers))
    return tuple(rows)


def shape(row: Weight, extents: Extents) -> tuple[int, ...]:
    """The shape of our array, padding and repetitions included."""
    pieces = [piece_size(row, stored, extents) for stored in row.stored]
    return tuple(
        sum(piece[axis] for piece in pieces) if axis == row.fuse else pieces[0][axis] for axis in row.axis_names
    )


def blocks(row: Weight, extents: Extents) -> tuple[Block, ...]:
    """The places of a row's stored tensors, in the order of the row. Padding follows each axis and each fused piece."""
    found: list[Block] = []
    offset = 0
    ends: dict[str, int] = {}  # of the parts of each tensor so far
    for stored in row.stored:
        size, times = stored_size(row, stored, extents)
        start = dict.fromkeys(row.axis_names, 0)
        if row.fuse is not None:
            start[row.fuse] = offset
        for chosen in itertools.product(*(range(size[axis]) for axis in stored.indexed)):
            index = dict(zip(stored.indexed, chosen, strict=True))
            name = stored.name_of(index, size)
            first = start | {axis: start[axis] + at * times.get(axis, 1) for axis, at in index.items()}
            one = size | dict.fromkeys(index, 1)
            found.append(Block(name, stored.dims, first, one, times, ends.get(name, 0)))
            ends[name] = found[-1].offset + math.prod(found[-1].stored_shape[:1])
        if row.fuse is not None:
            offset += piece_size(row, stored, extents)[row.fuse]
    return tuple(found)


def stored_shapes(places: Iterable[Block]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of which some places hold all parts, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in places:
        first, *others = block.stored_shape or (1,)
        shapes[block.name] = (block.offset + first, *others) if block.stored_shape else ()
    return shapes


def piece_size(row: Weight, stored: Stored, extents: Extents) -> dict[str, int]:
    """The size of every axis of the part of our array that `stored` fills, with its share of the padding."""
    return {a: length if isinstance(length, int) else extents[length] for a, length in _lengths(row, stored, extents)}


def stored_size(row: Weight, stored: Stored, extents: Extents) -> tuple[dict[str, int], dict[str, int]]:
    """The size of every axis by which `stored` is read, and how often our array holds each index of some of them."""
    lengths = dict(_lengths(row, stored, extents))
    for one in extents.repetitions:
        shared_by = next((axis for axis, length in lengths.items() if length == one.shared_by), None)
        for order in (row.axis_names, (*stored.indexed, *itertools.chain(*stored.dims))):
            if shared_by is not None and (one.axis, shared_by) not in itertools.pairwise(order):
                raise ValueError(
                    f"weight {row.path!r} has the axes {order} in {stored.name!r}: {shared_by!r} must follow "
                    f"{one.axis!r}, whose indices are repeated on this mesh"
                )
    sizes, times = extents.of_tensor(lengths.values())
    size = {a: length if isinstance(length, int) else sizes[length] for a, length in lengths.items()}
    return size, {a: times[a] for a in size if a in times}


def param_shapes(table: Iterable[Weight], *, extents: Extents, rules: ShardingRules, dtype: npt.DTypeLike) -> Params:
    """The parameters as a pytree of `jax.ShapeDtypeStruct`, each with its sharding."""
    return assemble((row.path, leaf_shape(row, extents, rules, dtype)) for row in expand(table, extents["layers"]))


def leaf_shape(row: Weight, extents: Extents, rules: ShardingRules, dtype: npt.DTypeLike) -> Any:
    """A row's `jax.ShapeDtypeStruct` with its sharding, or a `QuantizedWeight` of two, in a model of `dtype`."""

    def array(axes: int, dtype: npt.DTypeLike) -> Any:
        sharding = rules.sharding(row.axis_names[:axes])
        return jax.ShapeDtypeStruct(shape(row, extents)[:axes], dtype, sharding=sharding)

    axes = len(row.axis_names)
    if row.format is None:
        return array(axes, row.dtype or dtype)
    return QuantizedWeight(array(axes, np.int8), array(axes - row.inputs, np.float32), row.format)


def to_stored(row: Weight, array: npt.ArrayLike, extents: Extents) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The Hugging Face tensors that our array was made of, without the padding: the exact inverse of loading.

    Of repeated indices the first one is returned.
    """
    values = np.asarray(array)
    if values.shape != shape(row, extents):
        raise ValueError(f"weight {row.path!r} has the shape {values.shape}, expected {shape(row, extents)}")
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for block in blocks(row, extents):
        spans = [block.span(axis) for axis in row.axis_names]
        piece = values[tuple(slice(span.start, span.stop, span.step) for span in spans)]
        stored_order = list(itertools.chain(*block.dims))
        absent = [a for a in row.axis_names if a not in stored_order]
        ordered = piece.transpose([row.axis_names.index(a) for a in (*absent, *stored_order)])
        parts.setdefault(block.name, []).append(ordered.reshape(block.stored_shape))
    for name, pieces in parts.items():
        yield name, pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def leaf_of(params: Params, path: str) -> Any:
    """The leaf at a path: "layers.0.qkv" is `params["layers"][0]["qkv"]`."""
    for key in path.split("."):
        params = params[int(key) if key.isdigit() else key]
    return params


def assemble(leaves: Iterable[tuple[str, Any]]) -> Params:
    """A pytree from (path, leaf) pairs: "layers.0.qkv" -> {"layers": ({"qkv": leaf},)}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return _with_tuples(tree)


def _with_tuples(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if all(key.isdigit() for key in node):
        return tuple(_with_tuples(node[key]) for key in sorted(node, key=int))
    return {key: _with_tuples(child) for key, child in node.items()}


def _of_layer(row: Weight, layer: str) -> Weight:
    def written(text: str) -> str:
        return text.replace("{i}", layer)

    return replace(row, path=written(row.path), stored=tuple(replace(s, name=written(s.name)) for s in row.stored))


def _lengths(row: Weight, stored: Stored, extents: Extents) -> Iterator[tuple[str, str | int]]:
    """Every axis of the part that `stored` fills with its length: a number, or a name in the sizes."""
    for axis in row.axis_names:
        length = stored.size if axis == row.fuse else axis
        if length not in extents.sizes and not isinstance(length, int):
            known = sorted(extents.sizes)
            raise ValueError(f"weight {row.path!r} has the axis {length!r}, whose size is not among {known}")
        yield axis, length
