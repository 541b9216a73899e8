"""Gemma 1 and CodeGemma (Gemma team 2024, arXiv:2403.08295)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import OffsetNormConfig, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER

ARCHITECTURES = ("GemmaForCausalLM", "GemmaForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="gemma",
        model_type="gemma",
        model_class="GemmaForCausalLM",
        config={"hidden_act": "gelu_pytorch_tanh"},
        norms_plus_one=True,
    ),
)

DEFAULTS = {"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192}
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(OffsetNormConfig):
    """The facts of one Gemma model that its layers need.

    Attributes:
        rope: of every layer.
        attention_bias: whether attention's projections have biases.
    """

    rope: Rope
    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        require(
            config,
            hidden_act=("gelu_pytorch_tanh", "gelu"),  # the first files say "gelu" and mean the other
            hidden_activation=(None, "gelu_pytorch_tanh"),
            use_bidirectional_attention=(None, False),
        )
        fields = decoder_fields(config, tied=True)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(),
    )


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    return layers.embed(batch, params["embed"], scale=config.embed**0.5)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, activation="gelu_tanh")
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
