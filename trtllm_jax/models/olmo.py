"""OLMo (Groeneveld et al. 2024, arXiv:2402.00838), the first, whose layer norms have no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from pallas_kernels.norm import Norm
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, number, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("OlmoForCausalLM", "OlmoForSequenceClassification")

EPS = 1e-5
"""What every norm adds to the variance."""

GGUF = (
    GgufArchitecture(
        name="olmo",
        model_type="olmo",
        model_class="OlmoForCausalLM",
        permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
        metadata={"attention.layer_norm_epsilon": "layer_norm_eps", "attention.clamp_kqv": "clip_qkv"},
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one OLMo model that its layers need.

    Attributes:
        rope: of every layer.
        attention_bias: whether the four projections of attention have a bias.
        clip: the largest absolute value of queries, keys and values; None for any.
    """

    rope: Rope
    attention_bias: bool
    clip: float | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",), layer_norm_eps=(EPS,))
        fields = decoder_fields(config) | {"eps": EPS}
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
            clip=None if config.get("clip_qkv") is None else number(config, "clip_qkv", default=0.0),
        )

    def norm(self, params: Any, name: str) -> Norm:
        """The layer norm, which has no weights."""
        return Norm(jnp.ones(self.embed), self.eps, kind="layer")


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        *table_rows.gated_mlp(),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    qkv = qkv if config.clip is None else jnp.clip(qkv, -config.clip, config.clip)
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
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
