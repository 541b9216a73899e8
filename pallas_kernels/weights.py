"""Quantised weights: stored in fewer bits than they are computed in."""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

Format = Literal["int8"]
"""How a weight is quantised. "int8": 8-bit weights with a scale per output, and 16-bit activations (W8A16)."""

INT8_MAX = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [*outputs, *inputs] as integers and scales, which products take in place of an array of this shape.

    Attributes:
        values: the integers, [*outputs, *inputs].
        scales: [*outputs]; the weights of an output are its values times its scale. Scales are sharded as the outputs
            are.
        format: how the weight is quantised; static.
    """

    values: Int8[Array, "..."]
    scales: Float32[Array, "..."]
    format: Format = field(default="int8", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of the weight's axes."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def reshape(self, *shape: int) -> "QuantizedWeight":
        """The weight with its output axes reshaped and its inputs as one axis, the last of `shape`; one may be -1."""
        values = self.values.reshape(*shape)
        return QuantizedWeight(values, self.scales.reshape(values.shape[:-1]), self.format)

    def dequantized(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """The weight as an array of `dtype`."""
        scales = self.scales.reshape(*self.scales.shape, *(1,) * (self.ndim - self.scales.ndim))
        return (self.values.astype(jnp.float32) * scales).astype(dtype)


def quantize_int8(weight: Float[Array, "..."], inputs: int = 1) -> QuantizedWeight:
    """`weight` quantised symmetrically to 255 levels, with a scale per output; its last `inputs` axes are the inputs.

    The largest weight of an output has the largest level, and no weight is off by more than half its output's scale.
    """
    wide = weight.astype(jnp.float32)
    axes = tuple(range(weight.ndim - inputs, weight.ndim))
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    scales = jnp.where(largest > 0, largest / INT8_MAX, 1.0)
    values = jnp.clip(jnp.round(wide / scales), -INT8_MAX, INT8_MAX).astype(jnp.int8)
    return QuantizedWeight(values, jnp.squeeze(scales, axes))
