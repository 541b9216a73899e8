"""Phi-1, Phi-1.5 (Li et al. 2023, arXiv:2309.05463) and Phi-2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag
from trtllm_jax.nn.decoder import LayerNormConfig, activation, decoder_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, rotary_channels
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER, MLP

ARCHITECTURES = ("PhiForCausalLM", "PhiForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="phi2",
        model_type="phi",
        model_class="PhiForCausalLM",
        tensors={
            "output_norm": "model.final_layernorm",
            "blk.{i}.attn_output": f"{ATTENTION}.dense",
            "blk.{i}.ffn_up": f"{MLP}.fc1",
            "blk.{i}.ffn_down": f"{MLP}.fc2",
        },
        metadata={"attention.layer_norm_epsilon": "layer_norm_eps"},
        config={"hidden_act": "gelu_new"},
        partial_rotary=True,
    ),
)


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one Phi model that its layers need.

    Attributes:
        rope: of every layer, for a part of each head.
        normalised_heads: whether queries and keys are normalised.
        activation: of the feed-forward block.
    """

    rope: Rope
    normalised_heads: bool
    activation: Activation

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {"layer_norm_eps": 1e-5, **config}
        fields = decoder_fields(config, eps="layer_norm_eps")
        return cls(
            **fields,
            rope=Rope.from_config(config, rotary_channels(config, fields["head_dim"], 0.5)),
            normalised_heads=flag(config, "qk_layernorm"),
            activation=activation(config, "gelu_new"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    rows = [
        *table_rows.vocabulary(config, bias=True),
        *table_rows.norm("norm", "model.final_layernorm", bias=True),
        *table_rows.norm("layers.{i}.norm", f"{LAYER}.input_layernorm", bias=True),
        *table_rows.attention(bias=True, output_bias=True, output="dense"),
        *table_rows.plain_mlp(f"{MLP}.fc1", f"{MLP}.fc2", bias=True),
    ]
    if config.normalised_heads:
        rows += table_rows.head_norms(names=("q_layernorm", "k_layernorm"), bias=True)
    return tuple(rows)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, whose two blocks read the same rows, and its cache with this batch's."""
    residual, normed = layers.normalised(residual, config.norm(p, "norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p["qkv_bias"])
    attended, cache = layers.attention(
        qkv, batch, cache,
        norms=config.head_norms(p) if config.normalised_heads else None, rotation=batch.rotations[0],
        scale=config.head_dim**-0.5,
    )  # fmt: skip
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p["o_bias"])
    with jax.named_scope("mlp"):
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p["up_bias"])
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p["down_bias"]), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
