"""Qwen2 and Qwen2.5, their Coder and Math models too (Yang et al. 2024, arXiv:2407.10671)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields, switched_windows
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification")

GGUF = (GgufArchitecture(name="qwen2", model_type="qwen2", model_class="Qwen2ForCausalLM"),)

DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Qwen2 model that its layers need: `rope` is that of every layer."""

    rope: Rope

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        require(config, hidden_act=("silu",))
        fields = decoder_fields(config)
        fields["windows"] = switched_windows(config, fields["num_layers"])
        return cls(**fields, rope=Rope.from_config(config, fields["head_dim"]))


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p["qkv_bias"])
    attended, cache = layers.attention(
        qkv, batch, cache,
        rotation=batch.rotations[0], scale=config.head_dim**-0.5, window=config.windows[index],
    )  # fmt: skip
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS)
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch)
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
