"""The products in plain XLA: the reference for the kernels, and the implementation where no kernel runs."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.devices import Platform
from pallas_kernels.matmul.activations import ACTIVATIONS, Activation
from pallas_kernels.weights import QuantizedWeight


def linear(
    x: jax.Array, w: jax.Array | QuantizedWeight, *, residual: jax.Array | None, platform: Platform
) -> jax.Array:
    """`pallas_kernels.matmul.linear`, of an x that is already normalised."""
    product = _product(x, w, platform)
    return (product if residual is None else product + residual.astype(product.dtype)).astype(x.dtype)


def gated_linear(x: jax.Array, w: jax.Array | QuantizedWeight, activation: Activation, platform: Platform) -> jax.Array:
    """`pallas_kernels.matmul.gated_linear`, of an x that is already normalised."""
    n = w.shape[1]
    both = _product(x, w.reshape(2 * n, -1), platform).astype(jnp.float32)
    return (ACTIVATIONS[activation](both[:, :n]) * both[:, n:]).astype(x.dtype)


def _product(x: jax.Array, w: jax.Array | QuantizedWeight, platform: Platform) -> jax.Array:
    """`x @ w.T`, accumulated in float32; the only place that tells arrays from quantised weights."""
    if isinstance(w, QuantizedWeight):
        # 8-bit integers are exact in 16-bit floats, and a scale per output can be applied after the sum.
        return _dot(x, w.values.astype(x.dtype), jnp.float32, platform) * w.scales
    # On a GPU the wider result would be written to memory, only for another kernel to read and round it.
    return _dot(x.astype(w.dtype), w, w.dtype if platform.on_gpu else jnp.float32, platform)


def _dot(x: jax.Array, w: jax.Array, result: jnp.dtype, platform: Platform) -> jax.Array:
    """`x @ w.T` of arrays of one dtype, accumulated in float32, as an array of dtype `result`."""
    rows = x.shape[0]
    if rows == 1 and platform.on_cpu and w.dtype != jnp.float32:
        # XLA's CPU backend has a fast path for 16-bit matmuls, but not for vectors: 10 times slower there.
        x = jnp.concatenate([x, x])
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=result)[:rows]
