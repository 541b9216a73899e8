"""How and where a model's layers are computed."""

from dataclasses import dataclass
from typing import Literal

from jax.sharding import Mesh

from pallas_kernels.devices import Platform
from sharding import ShardingRules


@dataclass(frozen=True)
class Execution:
    """How and where layers are computed; hashable, so that it can be a static argument of jit.

    Attributes:
        platform: the platform that computes them; None for JAX's default backend.
        rules: how arrays are sharded; None for the default rules, on the mesh of the enclosing `shard_map`.
        xla_only: whether no kernel is used, so that everything can be differentiated, mapped and partitioned.
        attention: the implementation of attention without a cache (`pallas_kernels.attention.attend`).
    """

    platform: Platform | None = None
    rules: ShardingRules | None = None
    xla_only: bool = False
    attention: Literal["xla", "cudnn"] | None = None

    @classmethod
    def on(cls, mesh: Mesh) -> "Execution":
        """Execution on the devices of a mesh, with kernels and the default sharding rules."""
        return cls(Platform.of(mesh), ShardingRules(mesh))

    @property
    def implementation(self) -> Literal["xla"] | None:
        """The `implementation` argument of operations that have kernels."""
        return "xla" if self.xla_only else None


DEFAULT_EXECUTION = Execution()
"""Execution on JAX's default backend, with kernels where it has any."""
