"""GPT-2 (Radford et al. 2019), with learnt positions instead of a rope."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Stored, Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import GPT2_NAMES, LayerNormConfig, activation, gpt2_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2ForSequenceClassification")

IGNORED = ("transformer.h.*.attn.bias",)
"""The causal mask, which older files have."""

LAYER = "transformer.h.{i}"
ATTENTION, MLP = f"{LAYER}.attn", f"{LAYER}.mlp"

GGUF = (
    GgufArchitecture(
        name="gpt2",
        model_type="gpt2",
        model_class="GPT2LMHeadModel",
        tensors={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "blk.{i}.attn_norm": f"{LAYER}.ln_1",
            "blk.{i}.attn_qkv": f"{ATTENTION}.c_attn",
            "blk.{i}.attn_output": f"{ATTENTION}.c_proj",
            "blk.{i}.ffn_norm": f"{LAYER}.ln_2",
            "blk.{i}.ffn_up": f"{MLP}.c_fc",
            "blk.{i}.ffn_down": f"{MLP}.c_proj",
        },
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        metadata={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        config={"activation_function": "gelu_new"},
        derived=lambda config: {theirs: config[ours] for ours, theirs in GPT2_NAMES.items()},
    ),
)


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one GPT-2 model that its layers need.

    Attributes:
        activation: of the feed-forward block.
        scaled: whether scores are divided by the square root of a head's channels.
        scaled_by_layer: whether scores are divided by the number of the layer too, which is 1 for the first.
    """

    activation: Activation
    scaled: bool
    scaled_by_layer: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, add_cross_attention=(False,))
        return cls(
            **gpt2_fields(config),
            activation=activation(config, "gelu_new", field="activation_function"),
            scaled=flag({"scale_attn_weights": True, **config}, "scale_attn_weights"),
            scaled_by_layer=flag(config, "scale_attn_by_inverse_layer_idx"),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | {"position": self.max_position}


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it; matrices have inputs first."""
    qkv, heads = "(qkv kv_heads head_dim)", "kv_heads group head_dim"
    return (
        *table_rows.vocabulary(config, "transformer.wte"),
        Weight("positions", "position embed", (Stored("transformer.wpe.weight", "position embed"),)),
        *table_rows.norm("norm", "transformer.ln_f", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.ln_1", bias=True),
        Weight(
            "layers.{i}.qkv",
            "kv_heads qkv head_dim embed",
            (Stored(f"{ATTENTION}.c_attn.weight", f"embed {qkv}", 3),),
            fuse="qkv",
        ),
        Weight(
            "layers.{i}.qkv_bias", "kv_heads qkv head_dim", (Stored(f"{ATTENTION}.c_attn.bias", qkv, 3),), fuse="qkv"
        ),
        Weight("layers.{i}.o", f"embed {heads}", (Stored(f"{ATTENTION}.c_proj.weight", f"({heads}) embed"),)),
        Weight("layers.{i}.o_bias", "embed", (Stored(f"{ATTENTION}.c_proj.bias", "embed"),)),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.ln_2", bias=True),
        Weight("layers.{i}.up", "mlp embed", (Stored(f"{MLP}.c_fc.weight", "embed mlp"),)),
        Weight("layers.{i}.up_bias", "mlp", (Stored(f"{MLP}.c_fc.bias", "mlp"),)),
        Weight("layers.{i}.down", "embed mlp", (Stored(f"{MLP}.c_proj.weight", "mlp embed"),)),
        Weight("layers.{i}.down_bias", "embed", (Stored(f"{MLP}.c_proj.bias", "embed"),)),
    )


def same_layer(config: Config, index: int) -> int:
    """The first layer that computes what layer `index` computes: itself if its number is a factor."""
    return index if config.scaled_by_layer else 0


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    return layers.with_positions(layers.embed(batch, params["embed"]), params["positions"], batch.positions)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    scale = (config.head_dim**-0.5 if config.scaled else 1.0) / (index + 1 if config.scaled_by_layer else 1)
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p["qkv_bias"])
    attended, cache = layers.attention(qkv, batch, cache, rotation=None, scale=scale)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p["o_bias"])
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p["up_bias"])
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p["down_bias"]), cache


cache_spec = decoder.cache_spec
ropes = decoder.no_ropes
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
