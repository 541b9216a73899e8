"""OPT (Zhang et al. 2022, arXiv:2205.01068) of all sizes but 350M, whose norms are behind its blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.table import Stored, Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, positive, require
from trtllm_jax.nn.decoder import LayerNormConfig, activation, decoder_fields, require_whole_heads
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("OPTForCausalLM", "OPTForSequenceClassification")

DECODER = "model.decoder"
LAYER = f"{DECODER}.layers.{{i}}"

FIRST_POSITION = 2
"""The row of the table of positions that belongs to the first token."""


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one OPT model that its layers need: its activation, and whether all projections have a bias."""

    activation: Activation
    bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(
            config,
            do_layer_norm_before=(True,),
            _remove_final_layer_norm=(False,),
            layer_norm_elementwise_affine=(True,),
            word_embed_proj_dim=(None, config.get("hidden_size")),
        )
        config = {"enable_bias": True, **config, "intermediate_size": positive(config, "ffn_dim")}
        fields = decoder_fields({**config, "num_key_value_heads": None, "head_dim": None}, tied=True)
        require_whole_heads(config)
        return cls(
            **(fields | {"eps": 1e-5}),
            activation=activation(config, "relu", field="activation_function"),
            bias=flag(config, "enable_bias"),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | {"position": FIRST_POSITION + self.max_position}


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    positions = Stored(f"{DECODER}.embed_positions.weight", "position embed")
    return (
        *table_rows.vocabulary(config, f"{DECODER}.embed_tokens"),
        Weight("positions", "position embed", (positions,)),
        *table_rows.norm("norm", f"{DECODER}.final_layer_norm", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.self_attn_layer_norm", bias=True),
        *table_rows.attention(
            bias=config.bias, output_bias=config.bias, module=f"{LAYER}.self_attn", output="out_proj"
        ),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.final_layer_norm", bias=True),
        *table_rows.plain_mlp(f"{LAYER}.fc1", f"{LAYER}.fc2", bias=config.bias),
    )


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    tokens = layers.embed(batch, params["embed"])
    return layers.with_positions(tokens, params["positions"], FIRST_POSITION + batch.positions)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(qkv, batch, cache, rotation=None, scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p.get("up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.no_ropes
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
