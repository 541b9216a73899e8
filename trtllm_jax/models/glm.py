"""GLM-4 (GLM team 2024, arXiv:2406.12793), GLM-Edge, and GLM-4-0414 and GLM-Z1, which normalise what blocks add."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, model_name, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, rotary_channels
from trtllm_jax.nn.table_rows import LAYER, MLP, PAIRED_HEADS, paired_sizes

GLM, GLM4 = "GlmForCausalLM", "Glm4ForCausalLM"
ARCHITECTURES = (GLM, GLM4, "GlmForSequenceClassification", "Glm4ForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="chatglm",
        model_type="glm",
        model_class=GLM,
        tensors={"blk.{i}.ffn_up": f"{MLP}.gate_up_proj"},
        partial_rotary=True,
    ),
    GgufArchitecture(
        name="glm4",
        model_type="glm4",
        model_class=GLM4,
        tensors={
            "blk.{i}.post_attention_norm": f"{LAYER}.post_self_attn_layernorm",
            "blk.{i}.ffn_up": f"{MLP}.gate_up_proj",
            "blk.{i}.post_ffw_norm": f"{LAYER}.post_mlp_layernorm",
        },
        partial_rotary=True,
    ),
)

DEFAULTS = {
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
}  # fmt: skip
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one GLM model that its layers need.

    Attributes:
        rope: of every layer, for the first `rotary` channels of each head.
        rotary: how many channels of a head are rotated.
        attention_bias: whether the projections to queries, keys and values have a bias.
        normalised_blocks: whether what a block adds to the residual stream is normalised.
    """

    rope: Rope
    rotary: int
    attention_bias: bool
    normalised_blocks: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        require(config, hidden_act=("silu",))
        fields = decoder_fields(config)
        rotary = rotary_channels(config, fields["head_dim"], 0.5)
        paired_sizes(fields["head_dim"], rotary)  # are refused here
        return cls(
            **fields,
            rope=Rope.from_config(config, rotary),
            rotary=rotary,
            attention_bias=flag(config, "attention_bias"),
            normalised_blocks=model_name(config) == "Glm4",
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | paired_sizes(self.head_dim, self.rotary)


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    rows = [
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=config.attention_bias, paired=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.stacked_mlp(),
    ]
    if config.normalised_blocks:
        rows += table_rows.norm("layers.{i}.post_attn_norm", f"{LAYER}.post_self_attn_layernorm")
        rows += table_rows.norm("layers.{i}.post_mlp_norm", f"{LAYER}.post_mlp_layernorm")
    return tuple(rows)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    qkv = qkv.reshape(*qkv.shape[:3], config.head_dim)
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    if config.normalised_blocks:
        rows = layers.linear(attended, p["o"], batch, *PAIRED_HEADS)
        residual = layers.add(residual, rows, config.norm(p, "post_attn_norm"))
    else:
        residual = layers.add_linear(residual, attended, p["o"], batch, *PAIRED_HEADS)
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch)
        if not config.normalised_blocks:
            return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache
        rows = layers.linear(hidden, p["down"], batch, "mlp")
        return layers.add(residual, rows, config.norm(p, "post_mlp_norm")), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
