"""How and where a model's layers are computed."""

from dataclasses import dataclass
from typing import Literal

from jax.sharding import Mesh

from pallas_kernels.devices import Platform
from sharding import ShardingRules


@dataclass(frozen=True)
class Execution:
    """How and where layers are computed; hashable, so that it may be static in jit.

    Attributes:
        platform: what computes; None for JAX's default backend.
        rules: how arrays are split; None for the default rules, on the mesh of the running `shard_map`.
        xla_only: whether XLA computes everything, which can be differentiated, mapped and partitioned.
        attention: what computes attention without a cache, as `pallas_kernels.attention.attend` takes it.
    """

    platform: Platform | None = None
    rules: ShardingRules | None = None
    xla_only: bool = False
    attention: Literal["xla", "cudnn"] | None = None

    @classmethod
    def on(cls, mesh: Mesh) -> "Execution":
        """With kernels, on the devices of a mesh and by the default rules."""
        return cls(Platform.of(mesh), ShardingRules(mesh))

    @property
    def implementation(self) -> Literal["xla"] | None:
        """What the operations that have kernels are told."""
        return "xla" if self.xla_only else None


DEFAULT_EXECUTION = Execution()
"""With kernels where there are any, on JAX's default backend."""
