"""Apertus (Swiss AI Initiative 2025, arXiv:2509.14233), whose activation is learnt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints.table import Stored, Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER, MLP

ARCHITECTURES = ("ApertusForCausalLM",)

ROPE = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
"""The rope of configurations that state none."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Apertus model that its layers need: its rope, and whether attention's products have biases."""

    rope: Rope
    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("xielu",))
        config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 65536, **config}
        if not config.get("rope_parameters") and not config.get("rope_scaling"):
            config["rope_parameters"] = ROPE
        fields = decoder_fields(config)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"], theta=12000000.0),
            attention_bias=flag(config, "attention_bias"),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | {"one": 1}


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    activation = {"alpha_p": "one", "alpha_n": "one", "beta": "", "eps": ""}
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.attention_layernorm"),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        *table_rows.head_norms(),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.feedforward_layernorm"),
        *table_rows.plain_mlp(f"{MLP}.up_proj", f"{MLP}.down_proj"),
        *(
            Weight(f"layers.{{i}}.{name}", axes, (Stored(f"{MLP}.act_fn.{name}", axes),))
            for name, axes in activation.items()
        ),
    )


def xielu(x: Float[Array, "..."], p: Any) -> Float[Array, "..."]:
    """The activation xIELU (Huang and Schlag 2024, arXiv:2411.13010) of a layer's parameters, computed in float32."""
    alpha_p, alpha_n, beta, eps = (p[name].astype(jnp.float32) for name in ("alpha_p", "alpha_n", "beta", "eps"))
    wide = x.astype(jnp.float32)
    above = jax.nn.softplus(alpha_p) * wide**2
    below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(wide, eps)) - wide)
    return (jnp.where(wide > 0, above, below) + beta * wide).astype(x.dtype)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(
        qkv, batch, cache,
        norms=config.head_norms(p), rotation=batch.rotations[0], scale=config.head_dim**-0.5,
    )  # fmt: skip
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = xielu(layers.linear(normed, p["up"], batch, "embed"), p)
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
head = decoder.head
