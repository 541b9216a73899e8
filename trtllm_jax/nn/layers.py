"""The functions that architectures are made of; each is pure and works on one device's part of its weights.

Axes: t tokens, h key-value heads, g query heads of a key-value head, d head_dim. Inside `shard_map` a weight's split
axes are local; the axis names passed to `linear` say which contraction needs a sum over devices.

A batch that says so is computed `plain`, without kernels: the stream and its rows carry that from `embed` to `logits`.
"""

from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

import sharding
from pallas_kernels import matmul
from pallas_kernels.attention import Rotation, Scoring, append_and_attend, attend
from pallas_kernels.matmul import Norm
from pallas_kernels.norm import add_rms_norm, rms_norm
from trtllm_jax.nn.batch import Batch, Cache


def activation_dtype(weight_dtype: jnp.dtype) -> jnp.dtype:
    """The dtype between matmuls: the weights' own on an accelerator, float32 on a CPU, which computes in it anyway."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(weight_dtype)


@flax.struct.dataclass
class Residual:
    """The residual stream [t, embed]: x, plus what the last block added where no kernel has summed it yet."""

    x: jax.Array
    added: jax.Array | None = None
    plain: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def total(self) -> jax.Array:
        """The stream as one array."""
        return self.x if self.added is None else self.x + self.added


class Normed(NamedTuple):
    """Rows [t, embed] that their product with a weight normalises first; with norm None they are normalised."""

    x: jax.Array
    norm: Norm | None
    plain: bool = False


def _xla_if(plain: bool) -> Literal["xla"] | None:
    return "xla" if plain else None


def embed(batch: Batch, table: jax.Array) -> Residual:
    """The stream that starts as the tokens' embeddings, from a `table` [vocab, embed] split by vocabulary.

    An id outside the vocabulary has an embedding of zeros.
    """
    local = batch.tokens - sharding.shard_index("vocab") * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    rows = _take_rows(table, jnp.where(inside, local, 0))
    x = sharding.all_reduce(jnp.where(inside[:, None], rows, 0), "vocab").astype(activation_dtype(table.dtype))
    return Residual(x, plain=batch.plain)


def _take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """`table[rows]`, kept where it stands.

    XLA's CPU backend gathers bfloat16 as float32 and would hoist the conversion of the whole table out of a decode
    loop, 4 ms a dispatch for 49,152 rows; it cannot once the table depends on the loop's own rows.
    """
    table, rows = lax.optimization_barrier((table, rows))
    return table.at[rows].get(mode="promise_in_bounds")


def normalised(residual: Residual, norm: Norm) -> tuple[Residual, Normed]:
    """The stream, summed, and its root-mean-square normalisation by a weight [embed] and an epsilon.

    (Zhang and Sennrich 2019, arXiv:1910.07467.)
    """
    if residual.added is None:
        return residual, Normed(residual.x, norm, residual.plain)
    total, normed = add_rms_norm(residual.x, residual.added, *norm, implementation=_xla_if(residual.plain))
    return Residual(total, plain=residual.plain), Normed(normed, None, residual.plain)


def linear(x: jax.Array | Normed, weight: jax.Array, *contracted: str, bias: jax.Array | None = None) -> jax.Array:
    """`x` times `weight`, contracted along the logical axes `contracted`: the last ones of both, in order.

    x [t, *contracted], weight [*out, *contracted], bias [*out]; the result is [t, *out] in x's dtype, accumulated in
    float32 and summed over the devices that split a contracted axis. An array that is no `Normed` is not plain.
    """
    rows, norm, plain = x if isinstance(x, Normed) else Normed(x, None)
    flat, matrix = _flat(rows, weight, len(contracted))
    product = matmul.linear(flat, matrix, norm=norm, implementation=_xla_if(plain) or "measured")
    product = sharding.all_reduce(product, *contracted)
    product = product.reshape(rows.shape[0], *weight.shape[: weight.ndim - len(contracted)])
    return product if bias is None else product + bias.astype(product.dtype)


def add_linear(
    residual: Residual, x: jax.Array, weight: jax.Array, *contracted: str, bias: jax.Array | None = None
) -> Residual:
    """The stream after a block whose last product is `linear(x, weight, *contracted)` [t, embed]."""
    flat, matrix = _flat(x, weight, len(contracted))
    if bias is None and not sharding.is_split(*contracted) and (residual.plain or matmul.adds_residual(flat, matrix)):
        implementation = _xla_if(residual.plain) or "measured"
        total = matmul.linear(flat, matrix, residual=residual.total, implementation=implementation)
        return Residual(total, plain=residual.plain)
    product = linear(Normed(x, None, residual.plain), weight, *contracted, bias=bias)
    return Residual(residual.total, product, residual.plain)


def _flat(x: jax.Array, weight: jax.Array, contracted: int) -> tuple[jax.Array, jax.Array]:
    """Both as matrices whose last axis is contracted."""
    flat = x.reshape(x.shape[0], -1)
    return flat, weight.reshape(-1, flat.shape[1])


def attention(
    qkv: jax.Array, batch: Batch, cache: Cache, *, rotation: Rotation, scale: float
) -> tuple[jax.Array, Cache]:
    """Rotated causal attention [t, h, g, d] of fused projections [t, h, g + 2, d], and the cache that holds them."""
    scoring = Scoring(scale)
    with jax.named_scope("attention"):
        if cache is None or batch.page is None or batch.offset is None or batch.page_table is None:
            sequences = batch.lengths.shape[0]
            return attend(qkv, sequences, scoring=scoring, rotation=rotation, implementation=batch.attention), None
        return append_and_attend(
            qkv, cache, batch.page, batch.offset, batch.page_table, batch.lengths, batch.starts,
            scoring=scoring, rotation=rotation, implementation=_xla_if(batch.plain),
        )  # fmt: skip


def gated(x: Normed, gate_up: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """The hidden channels [t, mlp] of SwiGLU: gate_up [2, mlp, embed], bias [2, mlp].

    (Shazeer 2020, arXiv:2002.05202.)
    """
    if bias is None:
        return matmul.gated_linear(x.x, gate_up, norm=x.norm, implementation=_xla_if(x.plain) or "measured")
    both = linear(x, gate_up, "embed", bias=bias)
    return jax.nn.silu(both[:, 0]) * both[:, 1]


def logits(x: Normed, table: jax.Array, vocab: int) -> jax.Array:
    """Scores [t, vocab] in x's dtype, by a `table` [padded vocab, embed] split by vocabulary."""
    with jax.named_scope("logits"):
        return sharding.all_gather(linear(x, table, "embed"), "vocab", 1)[:, :vocab]


def unit_rows(rows: Normed) -> jax.Array:
    """The rows [t, embed], normalised and then of length one, in float32 as everything on the way."""
    x = rows.x.astype(jnp.float32)
    x = x if rows.norm is None else rms_norm(x, *rows.norm, implementation="xla")
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
