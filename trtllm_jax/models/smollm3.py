"""SmolLM3: Llama whose every fourth layer does not rotate its heads (Yang et al. 2025, arXiv:2501.18795)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.error_text import short_repr
from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import SLIDING, DecoderConfig, decoder_fields, layer_windows, rotated_layers
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER

ARCHITECTURES = ("SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="smollm3",
        model_type="smollm3",
        model_class="SmolLM3ForCausalLM",
        permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one SmolLM3 model that its layers need.

    Attributes:
        rope: of the layers that rotate their heads.
        rotated: whether each layer does.
        attention_bias: whether the four projections of attention have a bias.
        mlp_bias: whether the three projections of the feed-forward block have a bias.
    """

    rope: Rope
    rotated: tuple[bool, ...]
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",))
        config = {"num_key_value_heads": 4, "max_position_embeddings": 32768, **config}
        fields = decoder_fields(config, tied=True)
        rotated = rotated_layers(config, fields["num_layers"])
        used = flag(config, "use_sliding_window")
        windowed = config if used else {**config, "sliding_window": None}
        fields["windows"] = layer_windows(windowed, fields["num_layers"], lambda index: not rotated[index])
        if not any(fields["windows"]) and SLIDING in (config.get("layer_types") or ()):
            raise ValueError(
                f"config.json has layer_types={short_repr(config['layer_types'])}, but use_sliding_window={used} and "
                f"sliding_window={short_repr(config.get('sliding_window'))}"
            )
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"], theta=2000000.0),
            rotated=rotated,
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
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


def same_layer(config: Config, index: int) -> int:
    """The first layer that computes what layer `index` computes: one that sees as far, and rotates or does not too."""
    return decoder.first_alike(index, config.windows, config.rotated)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    rotation = batch.rotations[0] if config.rotated[index] else None
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=rotation, scale=config.head_dim**-0.5, window=config.windows[index]
    )
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, bias=p.get("gate_up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


cache_spec = decoder.cache_spec
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
