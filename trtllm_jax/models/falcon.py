"""Falcon 7B, 40B, 180B and RefinedWeb (Almazrouei et al. 2023, arXiv:2311.16867), and Falcon 2 11B."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from checkpoints.table import Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.alibi import alibi_slopes
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, positive, require
from trtllm_jax.nn.decoder import LayerNormConfig, activation, decoder_fields, require_whole_heads
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("FalconForCausalLM", "FalconForSequenceClassification")

LAYER = "transformer.h.{i}"
ATTENTION, MLP = f"{LAYER}.self_attention", f"{LAYER}.mlp"

DEFAULTS = {"layer_norm_epsilon": 1e-5, "multi_query": True, "parallel_attn": True}
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one Falcon model that its layers need.

    Attributes:
        rope: of every layer; None where scores fall with the distance instead (ALiBi).
        bias: whether the four projections of a layer have a bias.
        parallel: whether both blocks of a layer read what enters the layer.
        mlp_norm: whether the feed-forward block has a norm of its own; else both read the same rows.
        activation: of the feed-forward block.
    """

    rope: Rope | None
    bias: bool
    parallel: bool
    mlp_norm: bool
    activation: Activation

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        embed, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
        require_whole_heads(config)
        grouped, parallel = flag(config, "new_decoder_architecture"), flag(config, "parallel_attn")
        if grouped:
            require(config, parallel_attn=(True,), num_ln_in_parallel_attn=(None, 2, 1))
        elif parallel:
            require(config, num_ln_in_parallel_attn=(None, 1))
        sizes = {
            "num_key_value_heads": _kv_heads(config, heads),
            "intermediate_size": positive(config, "ffn_hidden_size", default=4 * embed),
            "head_dim": None,
        }
        fields = decoder_fields(config | sizes, eps="layer_norm_epsilon", tied=True)
        return cls(
            **fields,
            rope=None if flag(config, "alibi") else Rope.from_config(config, fields["head_dim"]),
            bias=flag(config, "bias"),
            parallel=parallel,
            mlp_norm=config.get("num_ln_in_parallel_attn") != 1 if grouped else not parallel,
            activation=activation(config, "gelu", field="activation"),
        )

    @property
    def slopes(self) -> Float32[Array, "kv_heads group"] | None:
        """ALiBi's slopes, times the scale of the scores: Falcon scales both together. None where there is a rope.

        Transformers rounds them, times the position, to bfloat16, and its eager attention adds them twice.
        """
        if self.rope is not None:
            return None
        slopes = alibi_slopes(self.kv_heads * self.group).reshape(self.kv_heads, self.group)
        return jnp.asarray(slopes) * self.head_dim**-0.5


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """The number of key-value heads, which only models of the newer kind state."""
    if not flag(config, "new_decoder_architecture"):
        if flag(config, "multi_query"):
            return 1
        require(config, num_kv_heads=(heads, None))
        return heads
    kv_heads = positive(config, "num_kv_heads", default=heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_kv_heads={kv_heads}")
    return kv_heads


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    before = "ln_attn" if config.parallel and config.mlp_norm else "input_layernorm"
    between = "ln_mlp" if config.parallel else "post_attention_layernorm"
    return (
        *table_rows.vocabulary(config, "transformer.word_embeddings"),
        *table_rows.norm("norm", "transformer.ln_f", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.{before}", bias=True),
        *table_rows.fused_attention(config, f"{ATTENTION}.query_key_value", f"{ATTENTION}.dense", bias=config.bias),
        *(table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.{between}", bias=True) if config.mlp_norm else ()),
        *table_rows.plain_mlp(f"{MLP}.dense_h_to_4h", f"{MLP}.dense_4h_to_h", bias=config.bias),
    )


def ropes(config: Config) -> tuple[Rope, ...]:
    """The rope of every layer, if there is one."""
    return () if config.rope is None else (config.rope,)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    entered = residual.x
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    if qkv.shape[2] - 2 != p["o"].shape[2]:
        raise ValueError(
            f"tensor_parallel_size is more than num_kv_heads={config.kv_heads}, whose groups of heads a Falcon "
            "checkpoint stores together; lower it"
        )
    rotation = batch.rotations[0] if batch.rotations else None
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=rotation, scale=config.head_dim**-0.5, slopes=config.slopes
    )
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        if not config.parallel:
            residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        elif config.mlp_norm:
            normed = layers.Normed(entered, config.norm(p, "mlp_norm"))
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p.get("up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
