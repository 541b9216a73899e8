"""Which mesh axes split a logical axis, and the shardings that follow for arrays of named axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.extents import Extents, Repetition

DEFAULT_RULES: Mapping[str, tuple[str, ...]] = {"vocab": ("tp",), "kv_heads": ("tp",), "mlp": ("tp",)}
"""The mesh axes that split each logical axis, outermost first. Axes not listed are replicated."""

SEPARATOR = "/"
"""Before it is the name of an axis, behind it what some layers have an extent of their own for: `kv_heads/wide`."""

SHARED_BY: Mapping[str, str] = {"kv_heads": "group"}
"""For a logical axis, the axis along which each of its indices is shared: a key-value head by a group of queries."""


def general(axis: str) -> str:
    """The axis whose rules another one follows: `kv_heads` for `kv_heads/wide`, and for itself."""
    return axis.partition(SEPARATOR)[0]


@dataclass(frozen=True)
class ShardingRules:
    """The placement of arrays with named logical axes on one mesh; hashable, so that it may be static in jit.

    Where layers differ in the extent of an axis, the one of some has a name of its own, `kv_heads/wide`, beside
    `group/wide`; it is split, padded and repeated as the one before the slash.

    Attributes:
        mesh: the devices.
        table: the mesh axes that split each logical axis, outermost first. Axes that the mesh lacks are ignored.
    """

    mesh: Mesh | AbstractMesh
    table: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DEFAULT_RULES, hash=False)

    def mesh_axes(self, *logical: str) -> tuple[str, ...]:
        """The mesh axes that split any of the `logical` axes, in order."""
        named = (name for axis in logical for name in self.table.get(general(axis), ()))
        return tuple(name for name in dict.fromkeys(named) if name in self.mesh.shape)

    def spec(self, axes: Sequence[str]) -> P:
        """The PartitionSpec of an array whose dimensions are the logical `axes`."""
        found = [self.mesh_axes(axis) for axis in axes]
        return P(*(names[0] if len(names) == 1 else names or None for names in found))

    def sharding(self, axes: Sequence[str]) -> NamedSharding:
        """The sharding of an array whose dimensions are the logical `axes`."""
        return NamedSharding(self.mesh, self.spec(axes))

    def parts(self, axis: str) -> int:
        """The number of parts into which the mesh splits a logical axis."""
        return math.prod(self.mesh.shape[name] for name in self.mesh_axes(axis))

    def extents(self, sizes: Mapping[str, int]) -> Extents:
        """The extents of a model's arrays on the mesh; every split axis is a multiple of its number of parts.

        If an axis has fewer indices than parts, they are repeated where the axis that shares them divides evenly: 4
        key-value heads on 8 devices become 8, each with half of the query heads. Any other axis is padded with zeros.
        A zero head, a zero feed-forward channel and a masked vocabulary entry do not change results, so any size runs
        on any mesh, at the cost of computing the padding (9 query and 3 key-value heads run as 12 and 4 on four
        devices).
        """
        padded: dict[str, int] = {}
        repetitions: list[Repetition] = []
        for axis in (axis for axis in sizes if general(axis) in self.table):
            repetition = self._repetition(axis, sizes)
            if repetition is None:
                parts = self.parts(axis)
                padded[axis] = -(-sizes[axis] // parts) * parts
            else:
                repetitions.append(repetition)
        return Extents(sizes, padded, tuple(repetitions))

    def _repetition(self, axis: str, sizes: Mapping[str, int]) -> Repetition | None:
        times, left = divmod(self.parts(axis), sizes[axis])
        base = general(axis)
        if base not in SHARED_BY:
            return None
        shared_by = SHARED_BY[base] + axis.removeprefix(base)
        if times < 2 or left or sizes.get(shared_by, 1) % times:
            return None
        return Repetition(axis, shared_by, times)


def rules_of_context() -> ShardingRules:
    """The default rules on the mesh of the enclosing `shard_map`; outside of one, on an empty mesh."""
    return ShardingRules(jax.sharding.get_abstract_mesh())
