"""Command R, Command R+, Aya 23 and Aya Expanse; Command R7B and Command A, which have windows (Cohere 2024, 2025)."""

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
from trtllm_jax.nn.config_fields import flag, number, positive, require
from trtllm_jax.nn.decoder import LayerNormConfig, decoder_fields, layer_windows
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import ATTENTION, LAYER, PAIRED_HEADS

COHERE, COHERE2 = ARCHITECTURES = ("CohereForCausalLM", "Cohere2ForCausalLM")

_NORMS_HEADS = 64
"""Layers from which on a model of the first kind normalises its heads; only Command R+ does."""

GGUF = (
    GgufArchitecture(
        name="command-r",
        model_type="cohere",
        model_class=COHERE,
        tensors={
            "blk.{i}.attn_q_norm": f"{ATTENTION}.q_norm",
            "blk.{i}.attn_k_norm": f"{ATTENTION}.k_norm",
        },
        metadata={"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
        # What no file states, by llama.cpp's rule.
        derived=lambda config: {"use_qk_norm": config["num_hidden_layers"] >= _NORMS_HEADS},
    ),
    GgufArchitecture(
        name="cohere2",
        model_type="cohere2",
        model_class=COHERE2,
        metadata={
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "attention.sliding_window": "sliding_window",
            "logit_scale": "logit_scale",
        },
    ),
)

DEFAULTS = {"layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "sliding_window": 4096}
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one Cohere model that its layers need.

    Attributes:
        rope: of the layers with a window, or of all where `rotates_all`.
        rotates_all: whether layers that see everything are rotated too.
        attention_bias: whether the four projections of attention have a bias.
        normalised_heads: whether queries and keys are normalised, each head with weights of its own.
        logit_scale: factor on the logits.
    """

    rope: Rope
    rotates_all: bool
    attention_bias: bool
    normalised_heads: bool
    logit_scale: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        require(config, hidden_act=("silu",))
        # Command R states the positions that it was trained for in a field of its own.
        longest = positive(config, "model_max_length", default=positive(config, "max_position_embeddings"))
        fields = decoder_fields({**config, "max_position_embeddings": longest}, eps="layer_norm_eps", tied=True)
        windowed = COHERE2 in (config.get("architectures") or ())
        if windowed:
            require(config, use_qk_norm=(False, None))
            positive(config, "sliding_window")  # which layers with a window must have
            period = positive(config, "sliding_window_pattern", default=4)
            fields["windows"] = layer_windows(config, fields["num_layers"], lambda index: (index + 1) % period != 0)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"], theta=10000.0 if windowed else 500000.0),
            rotates_all=not windowed,
            attention_bias=flag(config, "attention_bias"),
            normalised_heads=flag(config, "use_qk_norm"),
            logit_scale=number(config, "logit_scale", default=0.0625),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    bias = config.attention_bias
    rows = [
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=bias, output_bias=bias, paired=True),
        *table_rows.gated_mlp(),
    ]
    if config.normalised_heads:
        heads = "(kv_heads qkv) (pair half)"
        norms = (Stored(f"{ATTENTION}.q_norm.weight", heads, "group"), Stored(f"{ATTENTION}.k_norm.weight", heads))
        rows.append(Weight("layers.{i}.qk_norm", "kv_heads qkv half pair", norms, fuse="qkv"))
    return tuple(rows)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, whose two blocks read the same rows, and its cache with this batch's."""
    residual, normed = layers.normalised(residual, config.norm(p, "norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    qkv = qkv.reshape(*qkv.shape[:3], config.head_dim)
    if config.normalised_heads:
        weight = p["qk_norm"].reshape(*p["qk_norm"].shape[:2], config.head_dim)
        heads = layers.norm(qkv[:, :, :-1], Norm(weight, config.eps, kind="layer"), batch)
        qkv = jnp.concatenate([heads, qkv[:, :, -1:]], axis=2)
    window = config.windows[index]
    rotation = batch.rotations[0] if window or config.rotates_all else None
    attended, cache = layers.attention(qkv, batch, cache, rotation=rotation, scale=config.head_dim**-0.5, window=window)
    residual = layers.add_linear(residual, attended, p["o"], batch, *PAIRED_HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        hidden = layers.gated(normed, p["gate_up"], batch)
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache


def head(config: Config, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
    """Logits [n, vocab] of rows of the residual stream after the last layer."""
    return decoder.head(config, params, x, execution) * config.logit_scale


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
