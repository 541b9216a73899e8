"""Gemma 2 (Gemma team 2024, arXiv:2408.00118)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture, query_scalar
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import above_zero, flag, positive, require
from trtllm_jax.nn.decoder import OffsetNormConfig, decoder_fields, layer_windows
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification")

_27B_LAYERS = 46
"""Layers of the one published model whose queries are scaled by the channels that the stream has for each head."""

GGUF = (
    GgufArchitecture(
        name="gemma2",
        model_type="gemma2",
        model_class="Gemma2ForCausalLM",
        tensors={
            "blk.{i}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
            "blk.{i}.ffn_norm": f"{LAYER}.pre_feedforward_layernorm",
            "blk.{i}.post_ffw_norm": f"{LAYER}.post_feedforward_layernorm",
        },
        metadata={
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        config={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        derived=query_scalar(_27B_LAYERS),
        norms_plus_one=True,
    ),
)

DEFAULTS = {
    "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(OffsetNormConfig):
    """The facts of one Gemma 2 model that its layers need.

    Attributes:
        rope: of every layer.
        attention_bias: whether attention's projections have biases.
        query_scale: factor on the product of query and key.
        score_cap: scores become score_cap * tanh(score / score_cap); None for as they are.
        logit_cap: the same of logits.
    """

    rope: Rope
    attention_bias: bool
    query_scale: float
    score_cap: float | None
    logit_cap: float | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        require(config, hidden_activation=("gelu_pytorch_tanh",), use_bidirectional_attention=(None, False))
        fields = decoder_fields(config, tied=True)
        positive(config, "sliding_window")  # which layers with a window must have
        fields["windows"] = layer_windows(config, fields["num_layers"], lambda index: index % 2 == 0)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
            query_scale=positive(config, "query_pre_attn_scalar") ** -0.5,
            score_cap=above_zero(config, "attn_logit_softcapping"),
            logit_cap=above_zero(config, "final_logit_softcapping"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        *table_rows.norm("layers.{i}.post_attn_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.pre_feedforward_layernorm"),
        *table_rows.gated_mlp(),
        *table_rows.norm("layers.{i}.post_mlp_norm", f"{LAYER}.post_feedforward_layernorm"),
    )


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    return layers.embed(batch, params["embed"], scale=config.embed**0.5)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=batch.rotations[0], scale=config.query_scale, soft_cap=config.score_cap,
        window=config.windows[index],
    )  # fmt: skip
    rows = layers.linear(attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    residual = layers.add(residual, rows, config.norm(p, "post_attn_norm"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, activation="gelu_tanh")
        rows = layers.linear(hidden, p["down"], batch, "mlp")
        return layers.add(residual, rows, config.norm(p, "post_mlp_norm")), cache


def head(config: Config, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
    """Logits [n, vocab] of rows of the residual stream after the last layer."""
    return decoder.head(config, params, x, execution, soft_cap=config.logit_cap)


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
last_rows = decoder.last_rows
classify = decoder.classify
