"""How arrays are sharded: the device mesh, the rules from logical axes to mesh axes, and the collectives."""

from sharding.collectives import all_gather, all_reduce, is_split, shard_index
from sharding.extents import Extents, Repetition
from sharding.mesh import DeviceCountError, make_mesh
from sharding.rules import DEFAULT_RULES, ShardingRules, general, rules_of_context

__all__ = [
    "DEFAULT_RULES", "DeviceCountError", "Extents", "Repetition", "ShardingRules", "all_gather", "all_reduce",
    "general", "is_split", "make_mesh", "rules_of_context", "shard_index",
]  # fmt: skip
