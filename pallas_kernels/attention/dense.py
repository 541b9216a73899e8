"""Attention within whole sequences, without a cache, which can be differentiated, mapped and partitioned."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.masks import MASKED, Scoring
from pallas_kernels.attention.rotary import Rotation, rotate
from pallas_kernels.devices import Platform

Implementation = Literal["xla", "cudnn"]

LARGEST_CUDNN_HEAD = 128


def attend(
    qkv: Float[Array, "t h qkv d"],
    sequences: int,
    *,
    scoring: Scoring,
    rotation: Rotation | None = None,
    sinks: Float[Array, "h g"] | None = None,
    slopes: Float[Array, "h g"] | None = None,
    lengths: Int32[Array, " b"] | None = None,
    implementation: Implementation | None = None,
    platform: Platform | None = None,
) -> Float[Array, "t h g d"]:
    """Softmax attention of each token to the tokens of its own sequence, as `scoring` says.

    No token of a sequence attends to the padding after it.

    Args:
        qkv: for each key-value head its g query heads, its key and its value (qkv = g + 2).
        sequences: b, how many sequences there are; each has s = t / b consecutive tokens.
        scoring: how scores are computed, and which keys a query attends to.
        rotation: of each token; None if the heads are not rotated, or already are.
        sinks: for each query head a score that joins its softmax without a value; None for none.
        slopes: for each query head what a score falls by with every position between key and query; None for nothing.
        lengths: tokens of each sequence that are not padding; None if none is. Causal attention ignores them, because
            the padding comes after the tokens.
        implementation: "xla" keeps all scores, float32 [b, h, g, s, s]. "cudnn" keeps none, has only a first derivative
            in reverse mode, and raises ValueError where it does not support the arguments. None takes "cudnn" on a GPU
            where it supports them, else "xla".
        platform: the one that computes it; None for JAX's default backend.
    """
    tokens, heads, planes, dim = qkv.shape
    group = planes - 2
    turned = qkv[:, :, : group + 1]
    if rotation is not None:
        turned = rotate(turned, rotation)
    by_sequence = (sequences, tokens // sequences)
    q = turned[:, :, :group].reshape(*by_sequence, heads, group, dim)
    k = turned[:, :, group].reshape(*by_sequence, heads, dim)
    v = qkv[:, :, group + 1].reshape(*by_sequence, heads, dim)
    if implementation == "cudnn" or (
        implementation is None and _cudnn_takes(platform or Platform.default(), qkv, scoring, sinks, slopes)
    ):
        return _cudnn(q, k, v, scoring, sinks, slopes).reshape(tokens, heads, group, dim)
    lengths = None if scoring.causal else lengths
    return _xla(q, k, v, scoring, sinks, slopes, lengths).reshape(tokens, heads, group, dim)


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None,
    slopes: jax.Array | None,
    lengths: jax.Array | None,
) -> jax.Array:
    """Attention of queries [b, s, h, g, d] to keys and values [b, s, h, d], none of them at or after `lengths` [b]."""
    scores = scoring.scores(jnp.einsum("bqhgd,bkhd->bhgqk", q, k, preferred_element_type=jnp.float32))
    places = jnp.arange(q.shape[1])
    if slopes is not None:
        scores -= slopes.astype(jnp.float32)[:, :, None, None] * jnp.abs(places - places[:, None])
    visible = scoring.visible(places[:, None], places)
    if lengths is not None:
        real = places < lengths[:, None]
        visible = visible & real[:, None, None, None, :]
        # Zero the values of padding: a weight of 0 times a value that is not finite is NaN.
        v = jnp.where(real[:, :, None, None], v, 0)
    scores = jnp.where(visible, scores, MASKED)
    if sinks is not None:
        extra = jnp.broadcast_to(sinks.astype(jnp.float32)[:, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, extra], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


def _cudnn_takes(
    platform: Platform, qkv: jax.Array, scoring: Scoring, sinks: jax.Array | None, slopes: jax.Array | None
) -> bool:
    dim = qkv.shape[3]
    return (
        platform.on_gpu
        and qkv.dtype in (jnp.bfloat16, jnp.float16)
        and dim % 8 == 0
        and dim <= LARGEST_CUDNN_HEAD
        and scoring.causal
        and scoring.chunk is None
        and scoring.soft_cap is None
        and sinks is None
        and slopes is None
    )


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None,
    slopes: jax.Array | None,
) -> jax.Array:
    own = (scoring.chunk, scoring.soft_cap, sinks, slopes)
    if any(one is not None for one in own) or not scoring.causal:
        raise ValueError(
            "cuDNN's attention is causal, has no chunks, soft cap, sinks or slopes: use implementation='xla'"
        )
    queries = q.reshape(*q.shape[:2], -1, q.shape[4])
    window = None if scoring.window is None else (scoring.window - 1, 0)
    out = jax.nn.dot_product_attention(
        queries, k, v, scale=scoring.scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )
    return out.reshape(q.shape)
