"""A model as pure functions of its weights: an architecture and one configuration."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.devices import Platform
from trtllm_jax.nn import layers
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.cache_group import CacheGroup
from trtllm_jax.nn.dtypes import weight_dtype
from trtllm_jax.nn.execution import DEFAULT_EXECUTION, Execution
from trtllm_jax.nn.forward import C, hidden_states

Caches = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Model:
    """The pure functions of a model, from its architecture's module and its configuration.

    `execution` says how and where they compute; batches passed to them must be made with the same one.
    """

    module: ModuleType
    config: Any
    execution: Execution = field(default=DEFAULT_EXECUTION, kw_only=True)

    @property
    def platform(self) -> Platform:
        """The platform that computes the functions."""
        return self.execution.platform or Platform.default()

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """The layers whose caches are allocated, freed and reused together."""
        groups: tuple[CacheGroup, ...] = self.module.cache_spec(self.config)
        return groups

    @property
    def rope_stretch(self) -> int | None:
        """The longest sequence whose rotations do not depend on its length (dynamic, longrope); None if all are so."""
        trained = [rope.longer.trained for rope in self.module.ropes(self.config) if rope.longer]
        return min(trained, default=None)

    def weight_dtype(self, params: Any) -> jnp.dtype:
        """The dtype of every weight whose row in the table states none of its own."""
        return weight_dtype(self.module.table(self.config), params)

    def hidden(
        self, params: Any, batch: Batch, caches: tuple[C, ...], *, remat: bool = False
    ) -> tuple[Float[Array, "t embed"], tuple[C, ...]]:
        """The residual stream after the last layer, and the caches, if any, with the keys and values of this batch.

        With `remat` the backward pass computes each layer again instead of keeping its intermediate values.
        """
        return hidden_states(self.module, self.config, params, batch, caches, remat=remat)

    def logits(self, params: Any, x: Float[Array, "t embed"]) -> Float[Array, "t vocab"]:
        """The logits, float32 on a CPU and in the weights' dtype elsewhere."""
        scores: Array = self.module.head(self.config, params, x, self.execution)
        return scores

    def embeddings(self, params: Any, x: Float[Array, "t embed"]) -> Float32[Array, "t embed"]:
        """The rows from which the logits are computed, scaled to length one."""
        return layers.unit_rows(self.module.last_rows(self.config, params, x))
