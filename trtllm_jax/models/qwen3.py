"""Qwen3, dense (Qwen team 2025, arXiv:2505.09388)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields, switched_windows
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="qwen3",
        model_type="qwen3",
        model_class="Qwen3ForCausalLM",
        tensors={
            "blk.{i}.attn_q_norm": f"{ATTENTION}.q_norm",
            "blk.{i}.attn_k_norm": f"{ATTENTION}.k_norm",
        },
    ),
)

DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096}
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Qwen3 model that its layers need: `rope` is that of every layer."""

    rope: Rope
    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        require(config, hidden_act=("silu",))
        fields = decoder_fields(config)
        fields["windows"] = switched_windows(config, fields["num_layers"])
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
        *table_rows.head_norms(),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(
        qkv, batch, cache,
        norms=config.head_norms(p), rotation=batch.rotations[0], scale=config.head_dim**-0.5,
        window=config.windows[index],
    )  # fmt: skip
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
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
