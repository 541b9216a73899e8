"""Which mesh axes split a logical axis; everything that asks where an array lives asks here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.extents import Extents, Repetition

DEFAULT_RULES: Mapping[str, tuple[str, ...]] = {"vocab": ("tp",), "kv_heads": ("tp",), "mlp": ("tp",)}
"""The mesh axes that split a logical axis, the outermost first. Any other axis is replicated."""

SHARED_BY: Mapping[str, str] = {"kv_heads": "group"}
"""Logical axes each of whose indices serves all of another axis: a key-value head serves a group of query heads."""


@dataclass(frozen=True)
class ShardingRules:
    """Where arrays whose dimensions have logical names live on one mesh; hashable, so that it may be static in jit.

    Attributes:
        mesh: the devices.
        table: the mesh axes that split each logical axis, the outermost first. What the mesh lacks splits nothing.
    """

    mesh: Mesh | AbstractMesh
    table: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DEFAULT_RULES, hash=False)

    def mesh_axes(self, *logical: str) -> tuple[str, ...]:
        """The mesh axes that split any of the `logical` axes, in order."""
        named = (name for axis in logical for name in self.table.get(axis, ()))
        return tuple(name for name in dict.fromkeys(named) if name in self.mesh.shape)

    def spec(self, axes: Sequence[str]) -> P:
        """The PartitionSpec of an array whose dimensions are the logical `axes`."""
        found = [self.mesh_axes(axis) for axis in axes]
        return P(*(names[0] if len(names) == 1 else names or None for names in found))

    def sharding(self, axes: Sequence[str]) -> NamedSharding:
        """The sharding of an array whose dimensions are the logical `axes`."""
        return NamedSharding(self.mesh, self.spec(axes))

    def parts(self, axis: str) -> int:
        """Into how many parts the mesh splits a logical axis."""
        return math.prod(self.mesh.shape[name] for name in self.mesh_axes(axis))

    def extents(self, sizes: Mapping[str, int]) -> Extents:
        """The extents of a model's arrays on the mesh, which divides those of the axes that it splits.

        Where there are more parts than indices, indices are repeated if what shares them can be dealt out: 4 key-value
        heads on 8 devices are 8, each of half the query heads. Any other axis is padded with zeros. A zero head, a zero
        feed-forward channel and a masked vocabulary entry change no result, so any size runs on any mesh at the price
        of the padded work (9 query and 3 key-value heads run as 12 and 4 on four devices).
        """
        padded: dict[str, int] = {}
        repetitions: list[Repetition] = []
        for axis in (axis for axis in self.table if axis in sizes):
            repetition = self._repetition(axis, sizes)
            if repetition is None:
                parts = self.parts(axis)
                padded[axis] = -(-sizes[axis] // parts) * parts
            else:
                repetitions.append(repetition)
        return Extents(sizes, padded, tuple(repetitions))

    def _repetition(self, axis: str, sizes: Mapping[str, int]) -> Repetition | None:
        times, left = divmod(self.parts(axis), sizes[axis])
        shared_by = SHARED_BY.get(axis)
        if shared_by is None or times < 2 or left or sizes.get(shared_by, 1) % times:
            return None
        return Repetition(axis, shared_by, times)


def rules_of_context() -> ShardingRules:
    """The default rules on the mesh that the running `shard_map` splits arrays over; on none outside of one."""
    return ShardingRules(jax.sharding.get_abstract_mesh())
