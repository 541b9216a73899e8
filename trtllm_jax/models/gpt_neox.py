"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia (Biderman et al. 2023, arXiv:2304.01373)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.table import Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag
from trtllm_jax.nn.decoder import LayerNormConfig, activation, decoder_fields, require_whole_heads
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, rotary_channels
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification")

IGNORED = ("gpt_neox.layers.*.attention.bias",)
"""The causal mask, which older files have."""

LAYER = "gpt_neox.layers.{i}"
ATTENTION = f"{LAYER}.attention"


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one GPT-NeoX model that its layers need.

    Attributes:
        rope: of every layer, for a part of each head.
        attention_bias: whether the two projections of attention have a bias; the others always have.
        activation: of the feed-forward block.
        parallel: whether both blocks of a layer read what enters the layer.
    """

    rope: Rope
    attention_bias: bool
    activation: Activation
    parallel: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        defaults = {"layer_norm_eps": 1e-5, "attention_bias": True, "use_parallel_residual": True}
        config = {**defaults, **config, "num_key_value_heads": None, "head_dim": None}
        fields = decoder_fields(config, eps="layer_norm_eps")
        require_whole_heads(config)
        config |= {"rope_theta": config.get("rotary_emb_base"), "partial_rotary_factor": config.get("rotary_pct")}
        return cls(
            **fields,
            rope=Rope.from_config(config, rotary_channels(config, fields["head_dim"], 0.25)),
            attention_bias=flag(config, "attention_bias"),
            activation=activation(config, "gelu"),
            parallel=flag(config, "use_parallel_residual"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config, "gpt_neox.embed_in", "embed_out"),
        *table_rows.norm("norm", "gpt_neox.final_layer_norm", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm", bias=True),
        *table_rows.fused_attention(
            config, f"{ATTENTION}.query_key_value", f"{ATTENTION}.dense", bias=config.attention_bias
        ),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm", bias=True),
        *table_rows.plain_mlp(f"{LAYER}.mlp.dense_h_to_4h", f"{LAYER}.mlp.dense_4h_to_h", bias=True),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    entered = residual.x
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        if config.parallel:
            normed = layers.Normed(entered, config.norm(p, "mlp_norm"))
        else:
            residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p["up_bias"])
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p["down_bias"]), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
