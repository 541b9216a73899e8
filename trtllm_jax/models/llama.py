"""Llama 1 to 3.x (Touvron et al. 2023, arXiv:2302.13971), and models of the same layers: SmolLM2, InternLM3."""

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
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER

ARCHITECTURES = ("LlamaForCausalLM", "InternLM3ForCausalLM", "LlamaForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="llama",
        model_type="llama",
        model_class="LlamaForCausalLM",
        permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
    ),
)

DEFAULTS_INTERNLM3 = {
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""What fields that are absent mean in InternLM3."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Llama model that its layers need.

    Attributes:
        rope: of every layer.
        attention_bias: whether the projections to queries, keys and values have a bias.
        output_bias: whether attention's output projection has one.
        mlp_bias: whether the feed-forward block's projections have one.
    """

    rope: Rope
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        of_inputs, of_output, of_mlp = "attention_bias", "attention_bias", "mlp_bias"
        if model_name(config) == "InternLM3":
            config = {**DEFAULTS_INTERNLM3, **config}
            of_inputs, of_output, of_mlp = "qkv_bias", "bias", "bias"
        require(config, hidden_act=("silu",))
        fields = decoder_fields(config)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            attention_bias=flag(config, of_inputs),
            output_bias=flag(config, of_output),
            mlp_bias=flag(config, of_mlp),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.output_bias),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(bias=config.mlp_bias),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, bias=p.get("gate_up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
