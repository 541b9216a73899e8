"""The functions that architectures are made of; each is pure and works on one device's part of its weights.

Axes: t tokens, h key-value heads, g query heads of a key-value head, d head_dim. Inside `shard_map` a weight's split
axes are local; the axis names passed to `linear` say which contraction needs a sum over devices.
"""

import jax
import jax.numpy as jnp
from jax import lax

import sharding
from pallas_kernels.attention import paged_attention, write_pages
from trtllm_jax.batch import Batch
from trtllm_jax.rope import Rotation, rotate


def activation_dtype(weight_dtype: jnp.dtype) -> jnp.dtype:
    """The dtype between matmuls: the weights' own on an accelerator, float32 on a CPU, which computes in it anyway."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(weight_dtype)


def embed(tokens: jax.Array, table: jax.Array) -> jax.Array:
    """The embedding rows [t, embed] of `tokens` [t] from a `table` [vocab, embed] split by vocabulary."""
    local = tokens - sharding.shard_index("vocab") * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    rows = _take_rows(table, jnp.where(inside, local, 0))
    return sharding.all_reduce(jnp.where(inside[:, None], rows, 0), "vocab").astype(activation_dtype(table.dtype))


def _take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """`table[rows]`, kept where it stands.

    XLA's CPU backend gathers bfloat16 as float32 and would hoist the conversion of the whole table out of a decode
    loop, 4 ms a dispatch for 49,152 rows; it cannot once the table depends on the loop's own rows.
    """
    table, rows = lax.optimization_barrier((table, rows))
    return table.at[rows].get(mode="promise_in_bounds")


def linear(x: jax.Array, weight: jax.Array, *contracted: str, bias: jax.Array | None = None) -> jax.Array:
    """`x` times `weight`, contracted along the logical axes `contracted`: the last ones of both, in order.

    x [t, *contracted], weight [*out, *contracted], bias [*out]; the result is [t, *out] in x's dtype, accumulated in
    float32 and summed over the devices that split a contracted axis.
    """
    depth = len(contracted)
    rows, out_shape = x.shape[0], weight.shape[: weight.ndim - depth]
    flat = x.reshape(rows, -1).astype(weight.dtype)
    matrix = weight.reshape(-1, flat.shape[1])
    if rows == 1 and jax.default_backend() == "cpu" and weight.dtype != jnp.float32:
        # XLA's CPU backend has a fast path for 16-bit matmuls, but not for vectors: 10 times slower there.
        flat = jnp.concatenate([flat, flat])
    product = lax.dot_general(flat, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)[:rows]
    product = sharding.all_reduce(product.astype(x.dtype), *contracted).reshape(rows, *out_shape)
    return product if bias is None else product + bias.astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(jnp.float32)).astype(x.dtype)


def attention(
    qkv: jax.Array, batch: Batch, cache: jax.Array, *, rotation: Rotation, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Rotated causal attention [t, h, g, d] of fused projections [t, h, g + 2, d], and the cache that holds them."""
    with jax.named_scope("attention"):
        group = qkv.shape[2] - 2
        rotated = rotate(qkv[:, :, : group + 1], rotation)
        cache = write_pages(cache, rotated[:, :, group], qkv[:, :, group + 1], batch.page, batch.offset)
        attended = paged_attention(
            rotated[:, :, :group], cache, batch.page_table, batch.lengths, batch.starts, scale=scale
        )
    return attended, cache


def gated_mlp(
    x: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    gate_up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
) -> jax.Array:
    """The SwiGLU block (Shazeer 2020, arXiv:2002.05202): gate_up [2, mlp, embed], down [embed, mlp]."""
    with jax.named_scope("mlp"):
        both = linear(x, gate_up, "embed", bias=gate_up_bias)
        return linear(jax.nn.silu(both[:, 0]) * both[:, 1], down, "mlp", bias=down_bias)


def logits(x: jax.Array, table: jax.Array, vocab: int) -> jax.Array:
    """Scores [t, vocab] in float32 of a `table` [padded vocab, embed] split by vocabulary, joined on every device."""
    with jax.named_scope("logits"):
        return sharding.all_gather(linear(x, table, "embed"), "vocab", 1)[:, :vocab].astype(jnp.float32)
