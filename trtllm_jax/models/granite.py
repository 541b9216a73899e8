"""Granite 3.x (Granite team, IBM 2024): Llama with factors on embeddings, blocks, scores and logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, number, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER

ARCHITECTURES = ("GraniteForCausalLM",)

GGUF = (
    GgufArchitecture(
        name="granite",
        model_type="granite",
        model_class="GraniteForCausalLM",
        permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
        metadata={
            "embedding_scale": "embedding_multiplier",
            "attention.scale": "attention_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Granite model that its layers need.

    Attributes:
        rope: of every layer.
        attention_bias: whether the four projections of attention have a bias.
        mlp_bias: whether the three projections of the feed-forward block have a bias.
        embedding_multiplier: factor on the embeddings.
        attention_multiplier: factor on the product of query and key.
        residual_multiplier: factor on what a block adds to the residual stream.
        logits_scaling: what the logits are divided by.
    """

    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",))
        fields = decoder_fields(config)
        logits_scaling = number(config, "logits_scaling", default=1.0)
        if not logits_scaling:
            raise ValueError("config.json has logits_scaling=0; logits are divided by it")
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            embedding_multiplier=number(config, "embedding_multiplier", default=1.0),
            attention_multiplier=number(config, "attention_multiplier", default=1.0),
            residual_multiplier=number(config, "residual_multiplier", default=1.0),
            logits_scaling=logits_scaling,
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(bias=config.mlp_bias),
    )


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    return layers.embed(batch, params["embed"], scale=config.embedding_multiplier)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    factor = config.residual_multiplier
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=batch.rotations[0], scale=config.attention_multiplier
    )
    rows = layers.linear(attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    residual = layers.add(residual, rows * factor)
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, bias=p.get("gate_up_bias"))
        rows = layers.linear(hidden, p["down"], batch, "mlp", bias=p.get("down_bias"))
        return layers.add(residual, rows * factor), cache


def head(config: Config, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
    """Logits [n, vocab] of rows of the residual stream after the last layer."""
    return decoder.head(config, params, x, execution) / config.logits_scaling


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
last_rows = decoder.last_rows
