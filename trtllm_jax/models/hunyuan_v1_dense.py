"""Hunyuan dense (Tencent Hunyuan team 2025): queries and keys are normalised after their rotation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.error_text import short_repr
from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from pallas_kernels.attention import rotate_queries_and_keys
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import above_zero, flag, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER

ARCHITECTURES = ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1ForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="hunyuan-dense",
        model_type="hunyuan_v1_dense",
        model_class="HunYuanDenseV1ForCausalLM",
        tensors={
            "blk.{i}.attn_q_norm": f"{ATTENTION}.query_layernorm",
            "blk.{i}.attn_k_norm": f"{ATTENTION}.key_layernorm",
        },
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Hunyuan model that its layers need: its rope, and whether attention's products have biases."""

    rope: Rope
    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",), use_cla=(False, None))
        config = _with_larger_base({"rms_norm_eps": 1e-5, **config})
        fields = decoder_fields(config)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
        )


def _with_larger_base(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose rope of the type dynamic, if it has an `alpha`, is a plain one of the base that it means.

    It depends on no length, unlike the rope of that type in other models.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict) or (scaling.get("rope_type") or scaling.get("type")) != "dynamic":
        return dict(config)
    alpha = above_zero(scaling, "alpha")
    if alpha is None:
        return dict(config)
    channels = config.get("head_dim")
    if not isinstance(channels, int) or channels < 4:
        raise ValueError(
            f"config.json has head_dim={short_repr(channels)}; with alpha in rope_scaling it must be at least 4"
        )
    base = above_zero(scaling, "rope_theta") or above_zero(config, "rope_theta") or 10000.0
    rope = {"rope_type": "default", "rope_theta": base * alpha ** (channels / (channels - 2))}
    return {**config, "rope_scaling": None, "rope_parameters": rope}


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        *table_rows.norm("layers.{i}.q_norm", f"{ATTENTION}.query_layernorm", axis="head_dim"),
        *table_rows.norm("layers.{i}.k_norm", f"{ATTENTION}.key_layernorm", axis="head_dim"),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    qkv = rotate_queries_and_keys(qkv, batch.rotations[0])
    attended, cache = layers.attention(
        qkv, batch, cache,
        norms=config.head_norms(p), rotation=None, scale=config.head_dim**-0.5,
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
