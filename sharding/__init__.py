"""Where arrays live: the device mesh, the one table from logical axis to mesh axis, and the collectives."""

from sharding.collectives import all_gather, all_reduce, is_split, shard_index
from sharding.mesh import make_mesh
from sharding.rules import pad_sizes, spec_of

__all__ = ["all_gather", "all_reduce", "is_split", "make_mesh", "pad_sizes", "shard_index", "spec_of"]
