"""Attention of whole sequences without a cache, which can be differentiated, mapped and partitioned.

Axes: b sequences, s tokens of a sequence, h key-value heads, g query heads of a key-value head, d head_dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.attention.masks import MASKED, Scoring
from pallas_kernels.attention.rotary import Rotation, rotate
from pallas_kernels.devices import Platform

Implementation = Literal["xla", "cudnn"]

LARGEST_CUDNN_HEAD = 128


def attend(
    qkv: jax.Array,
    sequences: int,
    *,
    scoring: Scoring,
    rotation: Rotation | None = None,
    sinks: jax.Array | None = None,
    lengths: jax.Array | None = None,
    implementation: Implementation | None = None,
    platform: Platform | None = None,
) -> jax.Array:
    """Softmax attention of each token to those of its sequence that `scoring` lets it see: [b * s, h, g, d].

    What follows a sequence as padding is seen by none of its tokens.

    Args:
        qkv: [b * s, h, g + 2, d], projections: the query heads of a key-value head, its key, its value.
        sequences: b; each owns s consecutive tokens.
        scoring: how scores are made of products, and which keys a query sees.
        rotation: of each token; None for heads that are not rotated, or were before.
        sinks: float [h, g], a score without a value that every query head adds to its softmax; None for none.
        lengths: int32 [b], tokens of each sequence that are not padding, None for all. Only attention that is not
            causal looks at them: otherwise nobody sees what follows.
        implementation: XLA keeps all scores, float32 [b, h, g, s, s]. cuDNN keeps none and has a first derivative in
            reverse mode only; it raises where it cannot take the shapes. None takes it on a GPU where it can.
        platform: what computes; None for JAX's default backend.
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
        implementation is None and _cudnn_takes(platform or Platform.default(), qkv, scoring, sinks)
    ):
        return _cudnn(q, k, v, scoring, sinks).reshape(tokens, heads, group, dim)
    return _xla(q, k, v, scoring, sinks, None if scoring.causal else lengths).reshape(tokens, heads, group, dim)


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None,
    lengths: jax.Array | None,
) -> jax.Array:
    """[b, s, h, g, d] of queries of that shape and keys and values [b, s, h, d]; no key from `lengths` on is seen."""
    scores = scoring.scores(jnp.einsum("bqhgd,bkhd->bhgqk", q, k, preferred_element_type=jnp.float32))
    places = jnp.arange(q.shape[1])
    visible = scoring.visible(places[:, None], places)
    if lengths is not None:
        real = places < lengths[:, None]
        visible = visible & real[:, None, None, None, :]
        # A weight of 0 times a value that is not finite is NaN.
        v = jnp.where(real[:, :, None, None], v, 0)
    scores = jnp.where(visible, scores, MASKED)
    if sinks is not None:
        extra = jnp.broadcast_to(sinks.astype(jnp.float32)[:, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, extra], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)


def _cudnn_takes(platform: Platform, qkv: jax.Array, scoring: Scoring, sinks: jax.Array | None) -> bool:
    dim = qkv.shape[3]
    return (
        platform.on_gpu
        and qkv.dtype in (jnp.bfloat16, jnp.float16)
        and dim % 8 == 0
        and dim <= LARGEST_CUDNN_HEAD
        and scoring.causal
        and scoring.soft_cap is None
        and sinks is None
    )


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring, sinks: jax.Array | None) -> jax.Array:
    if scoring.soft_cap is not None or sinks is not None or not scoring.causal:
        raise ValueError("cuDNN's attention is causal, has no soft cap and no sinks: use implementation='xla'")
    queries = q.reshape(*q.shape[:2], -1, q.shape[4])
    window = None if scoring.window is None else (scoring.window - 1, 0)
    out = jax.nn.dot_product_attention(
        queries, k, v, scale=scoring.scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )
    return out.reshape(q.shape)
