"""The pure functions that architectures are made of, each working on one device's part of the weights.

Inside `shard_map` the sharded axes of a weight have their local size; the logical axis names passed to `linear` tell
which contractions must be summed over devices. Every layer takes the batch, whose `execution` says how and where the
layer is computed.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

import sharding
from pallas_kernels import matmul
from pallas_kernels.attention import (
    HeadNorms,
    Rotation,
    Scoring,
    append_and_attend,
    attend,
    normalise_queries_and_keys,
)
from pallas_kernels.matmul import ACTIVATIONS, Activation
from pallas_kernels.norm import Norm, add_and_normalise, normalise
from pallas_kernels.weights import QuantizedWeight
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.execution import Execution

AnyWeight = Float[Array, "..."] | QuantizedWeight
"""A weight of a product: an array, or the record that stands for a quantised one."""


@flax.struct.dataclass
class Residual:
    """The residual stream: `x`, plus the last block's output `added` where the two have not been summed yet.

    What is added is first normalised by `added_norm`, if there is one.
    `carried` is a pytree of what one layer leaves to later ones beside the stream, None for nothing. It stays until an
    architecture replaces it. Layers are compiled once for each structure and shapes of it.
    """

    x: Float[Array, "t embed"]
    added: Float[Array, "t embed"] | None = None
    carried: Any = None
    added_norm: Norm | None = None

    @property
    def total(self) -> Float[Array, "t embed"]:
        """The stream as one array, computed by XLA."""
        if self.added is None:
            return self.x
        return self.x + (self.added if self.added_norm is None else normalise(self.added, self.added_norm, "xla"))

    def summed(self, total: Float[Array, "t embed"]) -> "Residual":
        """The stream whose sum is `total`, with what is carried."""
        return Residual(total, None, self.carried)


class Normed(NamedTuple):
    """Rows and the normalisation that their next product applies first; None if they are already normalised."""

    x: Float[Array, "t embed"]
    norm: Norm | None


def embed(batch: Batch, table: Float[Array, "vocab embed"], scale: float | None = None) -> Residual:
    """The residual stream before the first layer: the tokens' embeddings, from a table sharded by vocabulary.

    An id outside the vocabulary has an embedding of zeros. Embeddings from the table are multiplied by `scale`, rounded
    to their dtype as in Gemma; embeddings that the batch supplies (`Batch.embeddings`) are not.
    """
    rules = batch.execution.rules
    local = batch.tokens - sharding.shard_index("vocab", rules) * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    taken = _take_rows(table, jnp.where(inside, local, 0))
    x = sharding.all_reduce(jnp.where(inside[:, None], taken, 0), "vocab", rules=rules)
    x = x if batch.dtype is None else x.astype(batch.dtype)
    x = x if scale is None else x * jnp.asarray(scale, x.dtype)
    if batch.embeddings is not None and batch.embedded is not None:
        x = jnp.where(batch.embedded[:, None], batch.embeddings.astype(x.dtype), x)
    return Residual(x)


def _take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """`table[rows]`, in a form that XLA cannot hoist out of a loop.

    XLA's CPU backend gathers bfloat16 as float32 and would convert the whole table before a decode loop, which takes
    4 ms a dispatch for 49,152 rows. The barrier makes the table depend on the rows, which change with every iteration.
    """
    table, rows = lax.optimization_barrier((table, rows))
    return table.at[rows].get(mode="promise_in_bounds")


def with_positions(
    residual: Residual, table: Float[Array, "positions embed"], positions: Int32[Array, " t"]
) -> Residual:
    """The residual stream plus the learnt embeddings of the tokens' positions; of those behind the last, the last."""
    rows = _take_rows(table, jnp.minimum(positions, table.shape[0] - 1))
    return residual.summed(residual.total + rows.astype(residual.x.dtype))


def norm(x: Float[Array, "*lead n"], norm: Norm, batch: Batch) -> Float[Array, "*lead n"]:
    """`x`, rows or heads, normalised over the last axis."""
    how = batch.execution
    return normalise(x, norm, how.implementation, how.platform)


def normalised(residual: Residual, norm: Norm, batch: Batch) -> tuple[Residual, Normed]:
    """The residual stream as one sum, and its rows for the next product, which may be left to normalise them."""
    if residual.added is None:
        return residual, Normed(residual.x, norm)
    how = batch.execution
    total, rows = add_and_normalise(
        residual.x, residual.added, norm, how.implementation, how.platform, added_norm=residual.added_norm
    )
    return residual.summed(total), Normed(rows, None)


def linear(
    x: Float[Array, "t ..."] | Normed,
    weight: AnyWeight,
    batch: Batch,
    *contracted: str,
    bias: Float[Array, "*out"] | None = None,
) -> Float[Array, " t *out"]:
    """`x` [t, *contracted] times `weight` [*out, *contracted], plus `bias`, in x's dtype.

    `contracted` names the logical axes of the contraction, which are the last ones of both operands, in order. The
    product is accumulated in float32 and summed over the devices that shard a contracted axis.
    """
    product = _product(x, weight, contracted, batch.execution)
    return product if bias is None else product + bias.astype(product.dtype)


def add_linear(
    residual: Residual,
    x: Float[Array, "t ..."],
    weight: AnyWeight,
    batch: Batch,
    *contracted: str,
    bias: Float[Array, " embed"] | None = None,
) -> Residual:
    """The residual stream plus `linear(x, weight, batch, *contracted, bias=bias)`, the last product of a block."""
    how = batch.execution
    if bias is None and not sharding.is_split(*contracted, rules=how.rules):
        flat, matrix = _flat(x, weight)
        if how.xla_only or matmul.adds_residual(flat, matrix, how.platform):
            return residual.summed(matmul.linear(flat, matrix, residual=residual.total, **_for_products(how)))
    return add(residual, linear(x, weight, batch, *contracted, bias=bias))


def add(residual: Residual, rows: Float[Array, "t embed"], norm: Norm | None = None) -> Residual:
    """The residual stream plus a block's output `rows`, which are normalised by `norm` if there is one.

    Both are left to the next `normalised`.
    """
    return Residual(residual.total, rows, residual.carried, norm)


def _product(x: jax.Array | Normed, weight: AnyWeight, contracted: tuple[str, ...], how: Execution) -> jax.Array:
    """`linear` without a bias."""
    rows, norm = x if isinstance(x, Normed) else Normed(x, None)
    flat, matrix = _flat(rows, weight)
    product = matmul.linear(flat, matrix, norm=norm, **_for_products(how))
    product = sharding.all_reduce(product, *contracted, rules=how.rules)
    return product.reshape(rows.shape[0], *weight.shape[: weight.ndim - len(contracted)])


def _for_products(how: Execution) -> dict[str, Any]:
    return {"implementation": how.implementation or "measured", "platform": how.platform}


def _flat(x: jax.Array, weight: AnyWeight) -> tuple[jax.Array, AnyWeight]:
    """Both operands as matrices, the contracted axes flattened into the last one."""
    flat = x.reshape(x.shape[0], -1)
    return flat, weight.reshape(-1, flat.shape[1])


def normalised_heads(qkv: Float[Array, "t h qkv d"], norms: HeadNorms, batch: Batch) -> Float[Array, "t h qkv d"]:
    """Fused projections with their queries and keys normalised, as `attention` does it where there are pages."""
    return normalise_queries_and_keys(qkv, norms, batch.execution.implementation, batch.execution.platform)


def normalised_across_heads(
    qkv: Float[Array, "t h qkv d"], weight: Float[Array, "h _ d"], batch: Batch, *, heads: int, eps: float
) -> Float[Array, "t h qkv d"]:
    """Fused projections whose queries are divided by the root mean square over all heads, and whose keys are too.

    The `weight` is [h, g + 1, d], of the queries and of the key. `heads` is the number of the model's query heads
    without padding; padded heads are zeros and add nothing to the sums.
    """
    turned = qkv[:, :, :-1].astype(jnp.float32)
    squares = jnp.sum(turned**2, axis=-1)
    # A key counts once for each query that it serves here: then devices that share a key-value head add up to once for
    # each query head of the model too, and both means are over as many channels.
    group = squares.shape[2] - 1
    sums = jnp.stack([squares[:, :, :-1].sum((1, 2)), group * squares[:, :, -1].sum(1)], axis=1)
    mean = sharding.all_reduce(sums, "kv_heads", rules=batch.execution.rules) / (heads * qkv.shape[-1])
    of_queries, of_keys = jnp.split(lax.rsqrt(mean + eps), 2, axis=1)
    scale = jnp.concatenate([jnp.repeat(of_queries, group, axis=1), of_keys], axis=1)
    normed = turned * scale[:, None, :, None] * weight.astype(jnp.float32)
    return jnp.concatenate([normed.astype(qkv.dtype), qkv[:, :, -1:]], axis=2)


def attention(
    qkv: Float[Array, "t h qkv d"],
    batch: Batch,
    cache: Cache,
    *,
    norms: HeadNorms | None = None,
    rotation: Rotation | None,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "h g"] | None = None,
    slopes: Float[Array, "..."] | None = None,
    causal: bool = True,
) -> tuple[Float[Array, "t h g d"], Cache]:
    """Attention of fused projections, and the cache after their keys and values have been written to it.

    Args:
        qkv: for each key-value head its g query heads, its key and its value (qkv = g + 2), before norm and rotation.
        batch: the batch that the projections belong to.
        cache: the layer's cache; None if the batch has none.
        norms: of queries and keys, before they are rotated; None if they are not normalised.
        rotation: one of `Batch.rotations`; None if the heads are not rotated.
        scale: the factor on the product of query and key.
        window: how many positions a query attends to, its own included; None for no limit.
        chunk: how many positions a chunk has, beyond whose first a query attends to none (Llama 4); None for no limit.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for no cap.
        sinks: for each query head a score that joins its softmax without a value; None for none.
        slopes: for each query head of the whole model, [kv_heads, group], what a score falls by with every position
            between key and query (ALiBi); None for nothing.
        causal: whether a query attends to no later position; may be False only without a cache.

    Raises:
        ValueError: there is a chunk beside a window, or the attention of a chunk is not causal; or a batch without
            pages does not state the lengths of its sequences.
    """
    scoring = Scoring(scale, soft_cap, window, causal, chunk)
    how = batch.execution
    if slopes is not None:
        slopes = _local_heads(slopes, qkv, how)
    with jax.named_scope("attention"):
        if cache is not None and batch.locations is not None:
            return append_and_attend(
                qkv, cache, batch.locations, scoring=scoring, norms=norms, rotation=rotation, sinks=sinks,
                slopes=slopes, implementation=how.implementation, platform=how.platform,
            )  # fmt: skip
        if batch.lengths is None:
            raise ValueError("a batch without pages states the lengths of its sequences: Batch.of_sequences")
        qkv = qkv if norms is None else normalised_heads(qkv, norms, batch)
        attended = attend(
            qkv, batch.lengths.shape[0], scoring=scoring, rotation=rotation, sinks=sinks, slopes=slopes,
            lengths=batch.lengths, implementation=how.attention, platform=how.platform,
        )  # fmt: skip
        return attended, None


def _local_heads(of_model: jax.Array, qkv: jax.Array, how: Execution) -> jax.Array:
    """What a model has for each of its query heads, for those of this device's `qkv`; any value for padded heads."""
    heads, group = qkv.shape[1], qkv.shape[2] - 2
    # Query heads keep their order also where devices share a key-value head.
    of_model = of_model.reshape(-1, group)
    padded = jnp.pad(of_model, ((0, -of_model.shape[0] % heads), (0, 0)))
    return lax.dynamic_slice_in_dim(padded, sharding.shard_index("kv_heads", how.rules) * heads, heads)


def gated(
    x: Normed,
    gate_up: Float[Array, "2 mlp embed"] | QuantizedWeight,
    batch: Batch,
    activation: Activation = "silu",
    bias: Float[Array, "2 mlp"] | None = None,
) -> Float[Array, "t mlp"]:
    """The hidden layer of a gated MLP (Shazeer 2020, arXiv:2002.05202); `gate_up` holds the gate's weights first."""
    if bias is None:
        return matmul.gated_linear(x.x, gate_up, norm=x.norm, activation=activation, **_for_products(batch.execution))
    both = linear(x, gate_up, batch, "embed", bias=bias)
    return ACTIVATIONS[activation](both[:, 0]) * both[:, 1]


def activated(
    x: Normed,
    up: Float[Array, "mlp embed"] | QuantizedWeight,
    batch: Batch,
    activation: Activation,
    bias: Float[Array, " mlp"] | None = None,
) -> Float[Array, "t mlp"]:
    """The hidden layer of an MLP without a gate."""
    return ACTIVATIONS[activation](linear(x, up, batch, "embed", bias=bias))


def logits(
    x: Normed,
    table: Float[Array, "part embed"] | QuantizedWeight,
    vocab: int,
    execution: Execution,
    *,
    bias: Float[Array, " part"] | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "n vocab"]:
    """The logits of n rows, in x's dtype, from a table of which each device holds a part of the padded vocabulary.

    The `bias` is one for each entry of the table. With `soft_cap` they are soft_cap * tanh(logit / soft_cap).
    """
    with jax.named_scope("logits"):
        parts = _product(x, table, ("embed",), execution)
        parts = parts if bias is None else parts + bias.astype(parts.dtype)
        scores = sharding.all_gather(parts, "vocab", 1, execution.rules)[:, :vocab]
        if soft_cap is None:
            return scores
        return (soft_cap * jnp.tanh(scores.astype(jnp.float32) / soft_cap)).astype(scores.dtype)


def projected(
    x: Normed, weight: AnyWeight, execution: Execution, bias: Float[Array, " out"] | None = None
) -> Float[Array, "n out"]:
    """Rows [n, embed] times a weight [out, embed] that every device has whole, plus `bias`, in x's dtype."""
    product = _product(x, weight, ("embed",), execution)
    return product if bias is None else product + bias.astype(product.dtype)


def unit(x: Float32[Array, "t embed"]) -> Float32[Array, "t embed"]:
    """Rows divided by their L2 norms; a row of zeros stays one."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def float_rows(rows: Normed) -> Float32[Array, "t embed"]:
    """The rows, normalised as their record says, computed in float32."""
    x = rows.x.astype(jnp.float32)
    return x if rows.norm is None else normalise(x, rows.norm, implementation="xla")
