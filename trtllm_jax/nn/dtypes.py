"""Which dtype a model's weights have, and which its activations."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.table import Weight, leaf_of


def weight_dtype(table: Iterable[Weight], params: Any) -> jnp.dtype:
    """The dtype of a model, which all weights have whose rows state none of their own."""
    row = next(row for row in table if row.dtype is None and row.format is None)
    return jnp.dtype(leaf_of(params, row.path.replace("{i}", "0")).dtype)


def activation_dtype(weight_dtype: jnp.dtype) -> jnp.dtype:
    """The dtype between matmuls: the weights' own on an accelerator, float32 on a CPU, which computes in it anyway."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(weight_dtype)
