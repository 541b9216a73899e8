"""The one table from logical axis to mesh axis; everything that asks where an array lives asks here."""

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

MESH_AXIS_OF: Mapping[str, str] = {"vocab": "tp", "kv_heads": "tp", "mlp": "tp"}
"""Logical axes that are split, and the mesh axis that splits them. Any other axis is replicated."""


def mesh_axes_of(axes: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes that split any of the logical `axes`, in order."""
    return tuple(dict.fromkeys(MESH_AXIS_OF[axis] for axis in axes if axis in MESH_AXIS_OF))


def spec_of(axes: Sequence[str]) -> P:
    """The PartitionSpec of an array whose dimensions are the logical `axes`."""
    return P(*(MESH_AXIS_OF.get(axis) for axis in axes))


def pad_sizes(sizes: Mapping[str, int], mesh: Mesh) -> dict[str, int]:
    """The sizes of the split axes, rounded up so that the mesh divides them; the padding holds zeros.

    A zero head, a zero feed-forward channel and a masked vocabulary entry change no result, so any size runs on any
    mesh at the price of the padded work (9 query and 3 KV heads run as 12 and 4 on four devices).
    """
    padded = {}
    for axis, mesh_axis in MESH_AXIS_OF.items():
        if axis in sizes:
            parts = mesh.shape[mesh_axis]
            padded[axis] = -(-sizes[axis] // parts) * parts
    return padded
