"""Llama 4 without experts, the text part of multimodal checkpoints included (Meta 2025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.error_text import short_repr
from checkpoints.table import Weight
from pallas_kernels.attention import HeadNorms, rotate_queries_and_keys
from pallas_kernels.norm import Norm
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, number, positive, require, text_config
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields, layer_chunks, rotated_layers
from trtllm_jax.nn.growing_scale import GrowingScale
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.reach import Reach
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import ATTENTION, LAYER, PAIRED_HEADS

ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")

IGNORED = ("vision_model.*", "multi_modal_projector.*")
"""Tensors of what sees pictures, which nothing reads."""

DEFAULTS = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "use_qk_norm": True, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
    "floor_scale": 8192,
}  # fmt: skip
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Llama 4 model that its layers need.

    Attributes:
        prefix: what the names of its tensors start with.
        chunks: for each layer the tokens of a chunk, before whose first a token sees none; None for no chunks.
        rope: of the layers that rotate their heads.
        rotated: whether each layer does.
        normalises_heads: whether queries and keys are normalised after their rotation.
        query_scale: by which the queries of layers without a rotation grow; None if they do not.
        attention_bias: whether the four projections of attention have a bias.
    """

    prefix: str
    chunks: tuple[int | None, ...]
    rope: Rope
    rotated: tuple[bool, ...]
    normalises_heads: bool
    query_scale: GrowingScale | None
    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        nested = "text_config" in config
        config = {**DEFAULTS, **(text_config(config, tied_beside=False) if nested else config)}
        require(config, hidden_act=("silu",))
        fields = decoder_fields({**config, "intermediate_size": positive(config, "intermediate_size_mlp")})
        _refuse_experts(config, fields["num_layers"])
        # Published files state an empty list of what they leave to the interval.
        rotated = rotated_layers(
            {**config, "no_rope_layers": config.get("no_rope_layers") or None}, fields["num_layers"]
        )
        scale = GrowingScale(number(config, "attn_scale", default=0.1), positive(config, "floor_scale"))
        return cls(
            **fields,
            prefix="language_model." if nested else "",
            chunks=layer_chunks(config, fields["num_layers"], lambda index: rotated[index]),
            rope=Rope.from_config(config, fields["head_dim"], theta=500000.0),
            rotated=rotated,
            normalises_heads=flag(config, "use_qk_norm"),
            query_scale=scale if flag(config, "attn_temperature_tuning") else None,
            attention_bias=flag(config, "attention_bias"),
        )

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """Which tokens a token of each layer reads."""
        return tuple(Reach(chunk=chunk) for chunk in self.chunks)


def _refuse_experts(config: Mapping[str, Any], num_layers: int) -> None:
    """Raise ValueError if a layer is a mixture of experts; the field that says so is named."""
    field, stated = "moe_layers", config.get("moe_layers")
    if stated is None:
        field, stated = "interleave_moe_layer_step", positive(config, "interleave_moe_layer_step", default=1)
        with_experts = list(range(stated - 1, num_layers, stated))
    elif isinstance(stated, list):
        with_experts = [index for index in range(num_layers) if index in stated]
    else:
        raise ValueError(f"config.json has moe_layers={short_repr(stated)}; it must be a list of layers")
    if with_experts:
        raise ValueError(
            f"config.json has {field}={short_repr(stated)}, by which layer {with_experts[0]} is a mixture of experts; "
            "mixtures are not supported yet: give a model of dense layers, moe_layers=[]"
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    prefix, bias = config.prefix, config.attention_bias
    layer = f"{prefix}{LAYER}"
    return (
        *table_rows.vocabulary(config, f"{prefix}model.embed_tokens", f"{prefix}lm_head"),
        *table_rows.norm("norm", f"{prefix}model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{layer}.input_layernorm"),
        *table_rows.attention(bias=bias, output_bias=bias, module=f"{prefix}{ATTENTION}", paired=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{layer}.post_attention_layernorm"),
        *table_rows.gated_mlp(module=f"{layer}.feed_forward"),
    )


def same_layer(config: Config, index: int) -> int:
    """The first layer that computes what layer `index` computes: one that sees as far, and rotates or does not too."""
    return decoder.first_alike(index, config.chunks, config.rotated)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    qkv = qkv.reshape(*qkv.shape[:3], config.head_dim)
    rotation, norms = batch.rotations[0] if config.rotated[index] else None, None
    if rotation is not None and config.normalises_heads:  # behind the rotation
        plain = Norm(jnp.ones(config.head_dim, qkv.dtype), config.eps)
        qkv, rotation, norms = rotate_queries_and_keys(qkv, rotation), None, HeadNorms(plain, plain)
    if not config.rotated[index] and config.query_scale is not None:
        qkv = config.query_scale.scaled(qkv, batch.positions + 1)
    attended, cache = layers.attention(
        qkv, batch, cache,
        norms=norms, rotation=rotation, scale=config.head_dim**-0.5, chunk=config.chunks[index],
    )  # fmt: skip
    residual = layers.add_linear(residual, attended, p["o"], batch, *PAIRED_HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch)
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache


cache_spec = decoder.cache_spec
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
