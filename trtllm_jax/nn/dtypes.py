"""The dtypes of a model's weights and activations."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from checkpoints.table import Weight, leaf_of
from pallas_kernels.devices import Platform


def weight_dtype(table: Iterable[Weight], params: Any) -> jnp.dtype:
    """The dtype of every weight whose row in the table states none of its own."""
    row = next(row for row in table if row.dtype is None and row.format is None)
    return jnp.dtype(leaf_of(params, row.path.replace("{i}", "0")).dtype)


def activation_dtype(weight_dtype: jnp.dtype, platform: Platform | None = None) -> jnp.dtype:
    """The dtype of activations: that of the weights, but float32 on a CPU, which computes in float32 anyway.

    `platform` is the one that computes them, None for JAX's default backend.
    """
    on_cpu = (platform or Platform.default()).on_cpu
    return jnp.dtype(jnp.float32) if on_cpu else jnp.dtype(weight_dtype)
