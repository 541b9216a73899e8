"""Nemotron-4 (Parmar et al. 2024, arXiv:2402.16819) and Minitron."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from pallas_kernels.matmul import Activation
from pallas_kernels.norm import Norm
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag
from trtllm_jax.nn.decoder import LayerNormConfig, activation, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, rotary_channels
from trtllm_jax.nn.table_rows import HEADS, LAYER, MLP

ARCHITECTURES = ("NemotronForCausalLM", "NemotronForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="nemotron",
        model_type="nemotron",
        model_class="NemotronForCausalLM",
        metadata={"attention.layer_norm_epsilon": "norm_eps"},
        config={"hidden_act": "relu2"},
        norms_plus_one=True,
        partial_rotary=True,
    ),
)


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one Nemotron model that its layers need.

    Attributes:
        rope: of every layer, for a part of each head.
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
        config = {"norm_eps": 1e-5, "max_position_embeddings": 4096, **config}
        fields = decoder_fields(config, eps="norm_eps")
        return cls(
            **fields,
            rope=Rope.from_config(config, rotary_channels(config, fields["head_dim"], 0.5)),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            activation=activation(config, "relu2"),
        )

    def norm(self, params: Any, name: str) -> Norm:
        """The layer norm under this name; its weight is stored less 1."""
        return replace(super().norm(params, name), offset=1.0)


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm", bias=True),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm", bias=True),
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
