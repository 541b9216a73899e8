"""StableLM 2 (Bellagente et al. 2024, arXiv:2402.17834) and StableLM-3B-4E1T."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Stored, Weight
from pallas_kernels.norm import Norm
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import LayerNormConfig, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, rotary_channels
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER

ARCHITECTURES = ("StableLmForCausalLM", "StableLmForSequenceClassification")

GGUF = (
    # Not of 12B: llama.cpp stacks the norms of its heads, and says of others too that their blocks are parallel.
    GgufArchitecture(
        name="stablelm",
        model_type="stablelm",
        model_class="StableLmForCausalLM",
        metadata={"attention.layer_norm_epsilon": "layer_norm_eps"},
        derived=lambda config: {"use_qkv_bias": config["attention_bias"]},
        partial_rotary=True,
    ),
)


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one StableLM model that its layers need.

    Attributes:
        rope: of every layer, for a part of each head.
        attention_bias: whether the projections to queries, keys and values have a bias.
        normalised_heads: whether queries and keys are normalised, each head with weights of its own.
        parallel: whether both blocks of a layer read what enters the layer, normalised once.
    """

    rope: Rope
    attention_bias: bool
    normalised_heads: bool
    parallel: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",))
        defaults = {"num_key_value_heads": 32, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5}
        config = {**defaults, **config, "head_dim": None}
        fields = decoder_fields(config, eps="layer_norm_eps")
        return cls(
            **fields,
            rope=Rope.from_config(config, rotary_channels(config, fields["head_dim"], 0.25)),
            attention_bias=flag(config, "use_qkv_bias"),
            normalised_heads=flag(config, "qk_layernorm"),
            parallel=flag(config, "use_parallel_residual"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    rows = [
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm", bias=True),
        *table_rows.attention(bias=config.attention_bias),
        *table_rows.gated_mlp(),
    ]
    if not config.parallel:
        rows += table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm", bias=True)
    if config.normalised_heads:
        norms = (
            Stored(f"{ATTENTION}.q_layernorm.norms.{{kv_heads qkv}}.weight", "head_dim", "group"),
            Stored(f"{ATTENTION}.k_layernorm.norms.{{kv_heads}}.weight", "head_dim"),
        )
        rows.append(Weight("layers.{i}.qk_norm", "kv_heads qkv head_dim", norms, fuse="qkv"))
    return tuple(rows)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    if config.normalised_heads:
        heads = layers.norm(qkv[:, :, :-1], Norm(p["qk_norm"], config.eps, kind="layer"), batch)
        qkv = jnp.concatenate([heads, qkv[:, :, -1:]], axis=2)
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS)
    with jax.named_scope("mlp"):
        if not config.parallel:
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
