"""BLOOM (Le Scao et al. 2022, arXiv:2211.05100), whose scores fall with the distance (ALiBi)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.alibi import alibi_slopes
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import LayerNormConfig, decoder_fields, require_whole_heads
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("BloomForCausalLM", "BloomForSequenceClassification")

LAYER = "transformer.h.{i}"
ATTENTION = f"{LAYER}.self_attention"


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one BLOOM model that its layers need.

    Attributes:
        normalised_residual: whether a block's output is added to what it read, normalised, instead of to the stream.
    """

    normalised_residual: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, slow_but_exact=(False,))
        # Files of different ages have different names.
        names = {
            "hidden_size": ("hidden_size", "n_embed"),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "max_position_embeddings": ("seq_length",),
        }
        stated = {name: next((config[one] for one in older if one in config), None) for name, older in names.items()}
        config = {"layer_norm_epsilon": 1e-5, "vocab_size": config.get("vocab_size"), **config} | stated
        if isinstance(config["hidden_size"], int):
            config["intermediate_size"] = 4 * config["hidden_size"]
        config = config | {"num_key_value_heads": None, "head_dim": None}
        fields = decoder_fields(config, eps="layer_norm_epsilon", tied=True)
        require_whole_heads(config)
        return cls(**fields, normalised_residual=flag(config, "apply_residual_connection_post_layernorm"))


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config, "transformer.word_embeddings"),
        *table_rows.norm("embed_norm", "transformer.word_embeddings_layernorm", bias=True),
        *table_rows.norm("norm", "transformer.ln_f", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm", bias=True),
        *table_rows.fused_attention(config, f"{ATTENTION}.query_key_value", f"{ATTENTION}.dense", bias=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm", bias=True),
        *table_rows.plain_mlp(f"{LAYER}.mlp.dense_h_to_4h", f"{LAYER}.mlp.dense_4h_to_h", bias=True),
    )


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer: the tokens' embeddings, normalised."""
    return Residual(layers.norm(decoder.embed(config, params, batch).x, config.norm(params, "embed_norm"), batch))


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = _entered(config, p, "attn_norm", residual, batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p["qkv_bias"])
    slopes = jnp.asarray(alibi_slopes(config.kv_heads))
    attended, cache = layers.attention(qkv, batch, cache, rotation=None, scale=config.head_dim**-0.5, slopes=slopes)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p["o_bias"])
    with jax.named_scope("mlp"):
        residual, normed = _entered(config, p, "mlp_norm", residual, batch)
        hidden = layers.activated(normed, p["up"], batch, "gelu_tanh", bias=p["up_bias"])
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p["down_bias"]), cache


def _entered(config: Config, p: Any, norm: str, residual: Residual, batch: Batch) -> tuple[Residual, layers.Normed]:
    """What a block's output is added to, and what the block reads."""
    if not config.normalised_residual:
        return layers.normalised(residual, config.norm(p, norm), batch)
    normed = layers.norm(residual.total, config.norm(p, norm), batch)
    return Residual(normed), layers.Normed(normed, None)


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.no_ropes
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
