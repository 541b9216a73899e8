"""Which dtype a model's weights have, and which its activations."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from checkpoints.table import Weight, leaf_of
from pallas_kernels.devices import Platform


def weight_dtype(table: Iterable[Weight], params: Any) -> jnp.dtype:
    """The dtype of a model, which all weights have whose rows state none of their own."""
    row = next(row for row in table if row.dtype is None and row.format is None)
    return jnp.dtype(leaf_of(params, row.path.replace("{i}", "0")).dtype)


def activation_dtype(weight_dtype: jnp.dtype, platform: Platform | None = None) -> jnp.dtype:
    """The dtype between matmuls: the weights' own on an accelerator, float32 on a CPU, which computes in it anyway.

    `platform` is what computes, None for JAX's default backend.
    """
    on_cpu = (platform or Platform.default()).on_cpu
    return jnp.dtype(jnp.float32) if on_cpu else jnp.dtype(weight_dtype)
