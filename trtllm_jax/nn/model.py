"""A model as pure functions of its weights: an architecture and one configuration."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

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
    """An architecture's module and one model's configuration, which together make the pure functions.

    `execution` says how and where they compute; the batch that a function takes is made with it.
    """

    module: ModuleType
    config: Any
    execution: Execution = field(default=DEFAULT_EXECUTION, kw_only=True)

    @property
    def platform(self) -> Platform:
        """What computes."""
        return self.execution.platform or Platform.default()

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """The layers whose caches are allocated, freed and reused together."""
        groups: tuple[CacheGroup, ...] = self.module.cache_spec(self.config)
        return groups

    @property
    def rope_stretch(self) -> int | None:
        """The longest sequence whose keys depend on nothing but the tokens before them; None where all do."""
        trained = [rope.longer.trained for rope in self.module.ropes(self.config) if rope.longer]
        return min(trained, default=None)

    def weight_dtype(self, params: Any) -> jnp.dtype:
        """The dtype of the weights, but for those whose rows in the table state their own."""
        return weight_dtype(self.module.table(self.config), params)

    def hidden(
        self, params: Any, batch: Batch, caches: tuple[C, ...], *, remat: bool = False
    ) -> tuple[jax.Array, tuple[C, ...]]:
        """The residual stream [t, embed] after the last layer, and the caches, if any, with this batch's tokens.

        With `remat` a backward pass computes each layer again instead of keeping what is inside it.
        """
        return hidden_states(self.module, self.config, params, batch, caches, remat=remat)

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        """Scores [t, vocab], float32 on a CPU and in the weights' dtype elsewhere."""
        scores: jax.Array = self.module.head(self.config, params, x, self.execution)
        return scores

    def embeddings(self, params: Any, x: jax.Array) -> jax.Array:
        """The direction [t, embed] of what the scores are computed from: float32, of length one."""
        return layers.unit_rows(self.module.last_rows(self.config, params, x))
