"""The functions that architectures are made of; each is pure and works on one device's part of its weights.

Axes: t tokens, h key-value heads, g query heads of a key-value head, d head_dim. Inside `shard_map` a weight's split
axes are local; the axis names passed to `linear` say which contraction needs a sum over devices.

Every layer takes the batch, which says how and where it is computed (`Batch.execution`).
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

import sharding
from pallas_kernels import matmul
from pallas_kernels.attention import Rotation, Scoring, append_and_attend, attend
from pallas_kernels.matmul import ACTIVATIONS, Activation
from pallas_kernels.norm import Norm, add_and_normalise, normalise
from pallas_kernels.weights import QuantizedWeight
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.execution import Execution

AnyWeight = jax.Array | QuantizedWeight
"""What a product takes as its weight."""


@flax.struct.dataclass
class Residual:
    """The residual stream [t, embed]: x, plus what the last block added where no kernel has summed it yet."""

    x: jax.Array
    added: jax.Array | None = None

    @property
    def total(self) -> jax.Array:
        """The stream as one array."""
        return self.x if self.added is None else self.x + self.added


class Normed(NamedTuple):
    """Rows [t, embed] that their product with a weight normalises first; with norm None they are normalised."""

    x: jax.Array
    norm: Norm | None


def embed(batch: Batch, table: jax.Array, scale: float | None = None) -> Residual:
    """The stream that starts as the tokens' embeddings, from a `table` [vocab, embed] split by vocabulary.

    An id outside the vocabulary has an embedding of zeros. Those of the table are multiplied by `scale`, which is
    rounded to their dtype as Gemma does; those that the batch brings are not.
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
    """`table[rows]`, kept where it stands.

    XLA's CPU backend gathers bfloat16 as float32 and would hoist the conversion of the whole table out of a decode
    loop, 4 ms a dispatch for 49,152 rows; it cannot once the table depends on the loop's own rows.
    """
    table, rows = lax.optimization_barrier((table, rows))
    return table.at[rows].get(mode="promise_in_bounds")


def norm(x: jax.Array, norm: Norm, batch: Batch) -> jax.Array:
    """Rows or heads [..., n], normalised over their channels."""
    how = batch.execution
    return normalise(x, norm, how.implementation, how.platform)


def normalised(residual: Residual, norm: Norm, batch: Batch) -> tuple[Residual, Normed]:
    """The stream, summed, and its rows as the next product normalises them."""
    if residual.added is None:
        return residual, Normed(residual.x, norm)
    how = batch.execution
    total, rows = add_and_normalise(residual.x, residual.added, norm, how.implementation, how.platform)
    return Residual(total), Normed(rows, None)


def linear(
    x: jax.Array | Normed, weight: AnyWeight, batch: Batch, *contracted: str, bias: jax.Array | None = None
) -> jax.Array:
    """`x` times `weight`, contracted along the logical axes `contracted`: the last ones of both, in order.

    x [t, *contracted], weight [*out, *contracted], bias [*out]; the result is [t, *out] in x's dtype, accumulated in
    float32 and summed over the devices that split a contracted axis.
    """
    product = _product(x, weight, contracted, batch.execution)
    return product if bias is None else product + bias.astype(product.dtype)


def add_linear(
    residual: Residual,
    x: jax.Array,
    weight: AnyWeight,
    batch: Batch,
    *contracted: str,
    bias: jax.Array | None = None,
) -> Residual:
    """The stream after a block whose last product is `linear(x, weight, batch, *contracted)` [t, embed]."""
    how = batch.execution
    if bias is None and not sharding.is_split(*contracted, rules=how.rules):
        flat, matrix = _flat(x, weight)
        if how.xla_only or matmul.adds_residual(flat, matrix, how.platform):
            return Residual(matmul.linear(flat, matrix, residual=residual.total, **_for_products(how)))
    return add(residual, linear(x, weight, batch, *contracted, bias=bias))


def add(residual: Residual, rows: jax.Array) -> Residual:
    """The stream after a block that gives `rows` [t, embed]; the next norm sums both."""
    return Residual(residual.total, rows)


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
    """Both as matrices whose last axis is contracted."""
    flat = x.reshape(x.shape[0], -1)
    return flat, weight.reshape(-1, flat.shape[1])


def normalised_across_heads(qkv: jax.Array, weight: jax.Array, batch: Batch, *, heads: int, eps: float) -> jax.Array:
    """Projections [t, h, g + 2, d] whose queries are divided by the root mean square of all heads' channels, and keys.

    The `weight` is [h, g + 1, d], that of the queries and of the key. `heads` are the model's query heads, without the
    padding, whose channels are zeros and add nothing to the sums.
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
    qkv: jax.Array,
    batch: Batch,
    cache: Cache,
    *,
    rotation: Rotation | None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    causal: bool = True,
) -> tuple[jax.Array, Cache]:
    """Attention [t, h, g, d] of fused projections [t, h, g + 2, d], and the cache that holds their keys and values.

    Args:
        qkv: the query heads of a key-value head, its key, its value; not rotated yet.
        batch: whose tokens they are.
        cache: the layer's; None without one.
        rotation: one of the batch's, None for heads that are not rotated.
        scale: factor on the product of query and key.
        window: how many positions a query sees, its own and those before it; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for as they are.
        sinks: [h, g], a score without a value for each query head; None for none.
        causal: whether a query sees nothing behind its position; without a cache only it may be False.
    """
    scoring = Scoring(scale, soft_cap, window, causal)
    how = batch.execution
    with jax.named_scope("attention"):
        if cache is not None and batch.locations is not None:
            return append_and_attend(
                qkv, cache, batch.locations, scoring=scoring, rotation=rotation, sinks=sinks,
                implementation=how.implementation, platform=how.platform,
            )  # fmt: skip
        if batch.lengths is None:
            raise ValueError("a batch without pages states the lengths of its sequences: Batch.of_sequences")
        attended = attend(
            qkv, batch.lengths.shape[0], scoring=scoring, rotation=rotation, sinks=sinks, lengths=batch.lengths,
            implementation=how.attention, platform=how.platform,
        )  # fmt: skip
        return attended, None


def gated(
    x: Normed, gate_up: AnyWeight, batch: Batch, activation: Activation = "silu", bias: jax.Array | None = None
) -> jax.Array:
    """The hidden channels [t, mlp] of a gated MLP: gate_up [2, mlp, embed], bias [2, mlp].

    (Shazeer 2020, arXiv:2002.05202.)
    """
    if bias is None:
        return matmul.gated_linear(x.x, gate_up, norm=x.norm, activation=activation, **_for_products(batch.execution))
    both = linear(x, gate_up, batch, "embed", bias=bias)
    return ACTIVATIONS[activation](both[:, 0]) * both[:, 1]


def activated(
    x: Normed, up: AnyWeight, batch: Batch, activation: Activation, bias: jax.Array | None = None
) -> jax.Array:
    """The hidden channels [t, mlp] of an MLP without a gate: up [mlp, embed], bias [mlp]."""
    return ACTIVATIONS[activation](linear(x, up, batch, "embed", bias=bias))


def logits(
    x: Normed, table: AnyWeight, vocab: int, execution: Execution, *, soft_cap: float | None = None
) -> jax.Array:
    """Scores [n, vocab] in x's dtype of any rows [n, embed], by a `table` [padded vocab, embed] split by vocabulary.

    With `soft_cap` they are soft_cap * tanh(score / soft_cap).
    """
    with jax.named_scope("logits"):
        parts = _product(x, table, ("embed",), execution)
        scores = sharding.all_gather(parts, "vocab", 1, execution.rules)[:, :vocab]
        if soft_cap is None:
            return scores
        return (soft_cap * jnp.tanh(scores.astype(jnp.float32) / soft_cap)).astype(scores.dtype)


def unit_rows(rows: Normed) -> jax.Array:
    """The rows [t, embed], normalised and then of length one, in float32 as everything on the way."""
    x = rows.x.astype(jnp.float32)
    x = x if rows.norm is None else normalise(x, rows.norm, implementation="xla")
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
