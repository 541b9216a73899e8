"""MPT (MosaicML 2023), whose scores fall with the distance (ALiBi)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.error_text import short_repr
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.alibi import alibi_slopes
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import above_zero, require
from trtllm_jax.nn.decoder import LayerNormConfig, decoder_fields, num_labels, require_whole_heads
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("MptForCausalLM", "MPTForCausalLM", "MptForSequenceClassification")

LAYER = "transformer.blocks.{i}"


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one MPT model that its layers need.

    Attributes:
        clip: the largest absolute value of queries, keys and values; None for any.
        query_scale: factor on the product of query and key.
    """

    clip: float | None
    query_scale: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, no_bias=(True,), expansion_ratio=(4,), logit_scale=(None,), embedding_fraction=(1.0, 1))
        attention = config.get("attn_config") or {}
        if not isinstance(attention, Mapping):
            raise ValueError(f"config.json has attn_config={short_repr(attention)}; it must be an object")
        require(
            attention,
            alibi=(True,),
            prefix_lm=(False,),
            qk_ln=(False,),
            attn_type=("multihead_attention",),
            attn_uses_sequence_id=(False,),
            alibi_bias_max=(8,),  # transformers takes this for any other
        )
        width = config.get("d_model", 2048)
        renamed = {
            "hidden_size": width,
            "intermediate_size": 4 * width if isinstance(width, int) else width,
            "num_hidden_layers": config.get("n_layers", 24),
            "num_attention_heads": config.get("n_heads", 16),
            "max_position_embeddings": config.get("max_seq_len", 2048),
            "vocab_size": config.get("vocab_size", 50368),
            "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
            "tie_word_embeddings": config.get("tie_word_embeddings"),
        }
        fields = decoder_fields(renamed, eps="layer_norm_epsilon", tied=True)
        fields["labels"] = num_labels(config)
        require_whole_heads(renamed)
        return cls(
            **fields,
            clip=above_zero(attention, "clip_qkv"),
            query_scale=above_zero(attention, "softmax_scale") or fields["head_dim"] ** -0.5,
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config, "transformer.wte"),
        *table_rows.norm("norm", "transformer.norm_f"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.norm_1"),
        *table_rows.fused_attention(config, f"{LAYER}.attn.Wqkv", f"{LAYER}.attn.out_proj", stacked=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.norm_2"),
        *table_rows.plain_mlp(f"{LAYER}.ffn.up_proj", f"{LAYER}.ffn.down_proj"),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed")
    if config.clip is not None:
        qkv = jnp.clip(qkv, -config.clip, config.clip)
    slopes = jnp.asarray(alibi_slopes(config.kv_heads))
    attended, cache = layers.attention(qkv, batch, cache, rotation=None, scale=config.query_scale, slopes=slopes)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS)
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.activated(normed, p["up"], batch, "gelu")
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
embed = decoder.embed
ropes = decoder.no_ropes
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
