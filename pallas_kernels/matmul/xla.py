"""The products in plain XLA: the reference for the kernel, and what runs where no kernel does."""

import jax
import jax.numpy as jnp
from jax import lax


def linear(x: jax.Array, w: jax.Array, *, residual: jax.Array | None) -> jax.Array:
    """As the public function of this name, x normalised already."""
    product = _product(x, w)
    return (product if residual is None else product + residual.astype(product.dtype)).astype(x.dtype)


def gated_linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """As the public function of this name, x normalised already."""
    n = w.shape[1]
    both = _product(x, w.reshape(2 * n, -1)).astype(jnp.float32)
    return (jax.nn.silu(both[:, :n]) * both[:, n:]).astype(x.dtype)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w.T`, accumulated in float32: in float32, or on a GPU in w's dtype.

    A GPU's matmul would write the wider result, only for another kernel to read and round it.
    """
    rows, backend = x.shape[0], jax.default_backend()
    x = x.astype(w.dtype)
    if rows == 1 and backend == "cpu" and w.dtype != jnp.float32:
        # XLA's CPU backend has a fast path for 16-bit matmuls, but not for vectors: 10 times slower there.
        x = jnp.concatenate([x, x])
    result = w.dtype if backend == "gpu" else jnp.float32
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=result)[:rows]
