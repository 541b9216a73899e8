"""A model as pure functions of its weights: an architecture and one configuration."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.devices import Platform
from trtllm_jax.nn import layers
from trtllm_jax.nn.batch import Batch, Caches
from trtllm_jax.nn.cache_group import CacheGroup
from trtllm_jax.nn.dtypes import weight_dtype
from trtllm_jax.nn.execution import DEFAULT_EXECUTION, Execution
from trtllm_jax.nn.forward import hidden_states
from trtllm_jax.nn.pooling import Pooling, pooled


@dataclass(frozen=True)
class Model:
    """The pure functions of a model, from its architecture's module and its configuration.

    Attributes:
        module: the architecture, a module of `trtllm_jax.models`.
        config: the architecture's configuration.
        execution: how and where the functions compute; batches passed to them must be made with the same one.
        pooling: how embeddings of whole sequences are made.
        encode_only: whether sequences are only ever computed whole, without a cache; models that have no logits of next
            tokens are so in any case.
    """

    module: ModuleType
    config: Any
    execution: Execution = field(default=DEFAULT_EXECUTION, kw_only=True)
    pooling: Pooling = field(default=Pooling(), kw_only=True)
    encode_only: bool = field(default=False, kw_only=True)

    @property
    def platform(self) -> Platform:
        """The platform that computes the functions."""
        return self.execution.platform or Platform.default()

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """The layers whose caches are allocated, freed and reused together; none where sequences are computed whole."""
        groups: tuple[CacheGroup, ...] = self.module.cache_spec(self.config)
        return () if self.encode_only or not self.generates else groups

    @property
    def generates(self) -> bool:
        """Whether it has logits of next tokens; encoders, sequence classifiers and decoders by bare names have none."""
        return bool(self.module.cache_spec(self.config)) and not self.labels and not getattr(self.config, "bare", False)

    @property
    def labels(self) -> int:
        """The classes of a sequence classifier; 0 for other models."""
        return int(getattr(self.config, "labels", 0))

    @property
    def rope_stretch(self) -> int | None:
        """The longest sequence whose rotations do not depend on its length (dynamic, longrope); None if all are so."""
        trained = [rope.longer.trained for rope in self.module.ropes(self.config) if rope.longer]
        return min(trained, default=None)

    def weight_dtype(self, params: Any) -> jnp.dtype:
        """The dtype of every weight whose row in the table states none of its own."""
        return weight_dtype(self.module.table(self.config), params)

    def hidden(
        self, params: Any, batch: Batch, caches: Caches = (), *, remat: bool = False
    ) -> tuple[Float[Array, "t embed"], Caches]:
        """The residual stream after the last layer, and the caches, if any, with the keys and values of this batch.

        With `remat` the backward pass computes each layer again instead of keeping its intermediate values.
        """
        return hidden_states(self.module, self.config, params, batch, caches, remat=remat)

    def logits(self, params: Any, x: Float[Array, "t embed"]) -> Float[Array, "t vocab"]:
        """The logits, float32 on a CPU and in the weights' dtype elsewhere."""
        scores: Array = self.module.head(self.config, params, x, self.execution)
        return scores

    def encode(
        self,
        params: Any,
        tokens: Int32[Array, "b s"],
        lengths: Int32[Array, " b"],
        token_types: Int32[Array, "b s"] | None = None,
    ) -> Float32[Array, "b n"]:
        """One vector for each whole sequence, padded after its first `lengths` tokens: an embedding, or class logits.

        `token_types` are the segments of pairs of texts; None where there is one.
        """
        batch = Batch.of_sequences(tokens, lengths, self.execution, token_types)
        x, _ = self.hidden(params, batch)
        return self._vectors(params, x.reshape(*tokens.shape, -1), lengths)

    def _vectors(self, params: Any, x: Float[Array, "b s embed"], lengths: Int32[Array, " b"]) -> Float32[Array, "b n"]:
        if self.labels:
            scores: Array = self.module.classify(self.config, params, x, lengths, self.execution)
            return scores.astype(jnp.float32)
        rows = layers.float_rows(self.module.last_rows(self.config, params, x.reshape(-1, x.shape[-1])))
        return self._scaled(pooled(rows.reshape(*x.shape[:-1], -1), lengths, self.pooling.how))

    def embeddings(self, params: Any, x: Float[Array, "t embed"]) -> Float32[Array, "t embed"]:
        """The embeddings of texts that end in these rows, where the last token's hidden state makes them."""
        return self._scaled(layers.float_rows(self.module.last_rows(self.config, params, x)))

    def _scaled(self, found: Float32[Array, "n embed"]) -> Float32[Array, "n embed"]:
        return layers.unit(found) if self.pooling.normalize else found
