"""Weights that are stored in fewer bits than they are computed in."""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

Format = Literal["int8"]
"""How values and scales make a weight. "int8": 8 bits and a scale for each output, the activations in 16 (W8A16)."""

INT8_MAX = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [*outputs, *inputs] as integers and scales, in place of an array of this shape.

    Attributes:
        values: int8 [*outputs, *inputs].
        scales: float32 [*outputs]; an output's values times its scale are its weights. Its axes are those of the
            outputs, and so it lies on devices as the outputs do.
        format: what values and scales mean; static.
    """

    values: jax.Array
    scales: jax.Array
    format: Format = field(default="int8", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Axes of the weight."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the values."""
        return self.values.dtype

    def reshape(self, *shape: int) -> "QuantizedWeight":
        """The weight with other output axes and its inputs as one axis, the last of `shape`; one of them may be -1."""
        values = self.values.reshape(*shape)
        return QuantizedWeight(values, self.scales.reshape(values.shape[:-1]), self.format)

    def dequantized(self, dtype: jnp.dtype) -> jax.Array:
        """The weight as an array."""
        scales = self.scales.reshape(*self.scales.shape, *(1,) * (self.ndim - self.scales.ndim))
        return (self.values.astype(jnp.float32) * scales).astype(dtype)


def quantize_int8(weight: jax.Array, inputs: int = 1) -> QuantizedWeight:
    """`weight` [*outputs, *inputs] rounded to 255 levels that are symmetric about zero, its last axes being inputs.

    The largest weight of each output is kept to rounding; no weight is further off than half its output's scale.
    """
    wide = weight.astype(jnp.float32)
    axes = tuple(range(weight.ndim - inputs, weight.ndim))
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    scales = jnp.where(largest > 0, largest / INT8_MAX, 1.0)
    values = jnp.clip(jnp.round(wide / scales), -INT8_MAX, INT8_MAX).astype(jnp.int8)
    return QuantizedWeight(values, jnp.squeeze(scales, axes))
