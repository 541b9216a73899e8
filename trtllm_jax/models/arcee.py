"""Arcee Foundation Models (AFM, 2025): Llama with a squared ReLU instead of a gate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag
from trtllm_jax.nn.decoder import DecoderConfig, activation, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER, MLP

ARCHITECTURES = ("ArceeForCausalLM", "ArceeForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="arcee",
        model_type="arcee",
        model_class="ArceeForCausalLM",
        permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
        config={"hidden_act": "relu2"},
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Arcee model that its layers need.

    Attributes:
        rope: of every layer.
        attention_bias: whether the four projections of attention have a bias.
        mlp_bias: whether the two projections of the feed-forward block have a bias.
        activation: of the feed-forward block.
    """

    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    activation: Activation

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **config}
        fields = decoder_fields(config)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            activation=activation(config, "relu2"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.plain_mlp(f"{MLP}.up_proj", f"{MLP}.down_proj", bias=config.mlp_bias),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p.get("up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
