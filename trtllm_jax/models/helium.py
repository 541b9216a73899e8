"""Helium (Kyutai 2025): Llama that rotates neighbouring channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import LAYER, PAIRED_HEADS

ARCHITECTURES = ("HeliumForCausalLM",)

DEFAULTS = {"num_key_value_heads": 20, "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-8}
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Helium model that its layers need.

    Attributes:
        rope: of every layer.
        attention_bias: whether the projections to queries, keys and values have a bias.
        mlp_bias: whether the projections of the feed-forward block have one.
    """

    rope: Rope
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",))
        config = {**DEFAULTS, **config}
        fields = decoder_fields(config)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"], theta=100000.0),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=config.attention_bias, paired=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(bias=config.mlp_bias),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    qkv = qkv.reshape(*qkv.shape[:3], config.head_dim)
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *PAIRED_HEADS)
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, bias=p.get("gate_up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
head = decoder.head
