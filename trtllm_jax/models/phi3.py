"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219), Phi-3.5 and Phi-4 without experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields, layer_windows
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, rotary_channels
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER, MLP

ARCHITECTURES = ("Phi3ForCausalLM", "Phi3ForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="phi3",
        model_type="phi3",
        model_class="Phi3ForCausalLM",
        tensors={
            "blk.{i}.attn_qkv": f"{ATTENTION}.qkv_proj",
            "blk.{i}.ffn_up": f"{MLP}.gate_up_proj",
        },
        metadata={"attention.sliding_window": "sliding_window"},
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Phi-3 model that its layers need: `rope` is that of every layer."""

    rope: Rope

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        no = (False, None)
        require(config, hidden_act=("silu",), attention_bias=no, mlp_bias=no, lm_head_bias=no)
        config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **_with_longrope(config)}
        if config.get("sliding_window") == 0:
            config["sliding_window"] = None  # GGUF files without a window state one of 0
        fields = decoder_fields(config)
        fields["windows"] = layer_windows({**config, "layer_types": None}, fields["num_layers"])
        rope = Rope.from_config(config, rotary_channels(config, fields["head_dim"]))
        return cls(**fields, rope=rope)


def _with_longrope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the present name of LongRoPE, which older files call su or yarn."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(field)
    if isinstance(scaling, dict) and (scaling.get("rope_type") or scaling.get("type")) in ("su", "yarn"):
        scaling = {**scaling, "rope_type": "longrope"}
    return {"original_max_position_embeddings": 4096, **config, field: scaling}


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.fused_attention(config, f"{ATTENTION}.qkv_proj", f"{ATTENTION}.o_proj", stacked=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.stacked_mlp(),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed")
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5, window=config.windows[index]
    )
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
