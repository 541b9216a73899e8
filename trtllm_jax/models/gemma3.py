"""Gemma 3, the text part of multimodal checkpoints included (Gemma team 2025, arXiv:2503.19786)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture, query_scalar
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import above_zero, flag, positive, require, text_config
from trtllm_jax.nn.decoder import FULL, SLIDING, OffsetNormConfig, decoder_fields, layer_windows
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, of_layer_type
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER, MLP

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextForSequenceClassification")

IGNORED = ("vision_tower.*", "multi_modal_projector.*")
"""Tensors of what sees pictures, which nothing reads."""

_27B_LAYERS = 62
"""Layers of the one published model whose queries are scaled by the channels that the stream has for each head."""

GGUF = (
    GgufArchitecture(
        name="gemma3",
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        tensors={
            "blk.{i}.attn_q_norm": f"{ATTENTION}.q_norm",
            "blk.{i}.attn_k_norm": f"{ATTENTION}.k_norm",
            "blk.{i}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
            "blk.{i}.ffn_norm": f"{LAYER}.pre_feedforward_layernorm",
            "blk.{i}.post_ffw_norm": f"{LAYER}.post_feedforward_layernorm",
        },
        metadata={
            "attention.sliding_window": "sliding_window",
            "attention.sliding_window_pattern": "sliding_window_pattern",
            "rope.freq_base_swa": "rope_local_base_freq",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        config={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        derived=query_scalar(_27B_LAYERS),
        norms_plus_one=True,
    ),
)

DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
"""What fields that are absent mean: the published `text_config` records leave most of them out."""


@dataclass(frozen=True)
class Config(OffsetNormConfig):
    """The facts of one Gemma 3 model that its layers need.

    Attributes:
        prefix: what the names of its tensors start with.
        rope: of the layers that see everything.
        local_rope: of those with a window.
        attention_bias: whether attention's projections have biases.
        query_scale: factor on the product of query and key.
        logit_cap: logits become logit_cap * tanh(logit / logit_cap); None for as they are.
    """

    prefix: str
    rope: Rope
    local_rope: Rope
    attention_bias: bool
    query_scale: float
    logit_cap: float | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        nested = "text_config" in config
        config = {**DEFAULTS, **(text_config(config) if nested else config)}
        require(
            config,
            hidden_activation=("gelu_pytorch_tanh",),
            use_bidirectional_attention=(None, False),
            attn_logit_softcapping=(None,),  # transformers does not compute it
        )
        # Positions are those of the scaled rope already, whatever its type.
        fields = decoder_fields({**config, "rope_scaling": None, "rope_parameters": None}, tied=True)
        positive(config, "sliding_window")  # which layers with a window must have
        period = positive(config, "sliding_window_pattern", default=6)
        full = of_layer_type(config, FULL, ("rope_theta", 1e6))
        local = of_layer_type(config, SLIDING, ("rope_local_base_freq", 1e4), scaled=False)
        fields["windows"] = layer_windows(config, fields["num_layers"], lambda index: (index + 1) % period != 0)
        return cls(
            **fields,
            prefix="language_model." if nested else "",
            rope=Rope.from_config(full, fields["head_dim"]),
            local_rope=Rope.from_config(local, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
            query_scale=positive(config, "query_pre_attn_scalar") ** -0.5,
            logit_cap=above_zero(config, "final_logit_softcapping"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    prefix = config.prefix
    layer, attention = f"{prefix}{LAYER}", f"{prefix}{ATTENTION}"
    bias = config.attention_bias
    return (
        *table_rows.vocabulary(config, f"{prefix}model.embed_tokens", f"{prefix}lm_head"),
        *table_rows.norm("norm", f"{prefix}model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{layer}.input_layernorm"),
        *table_rows.attention(bias=bias, output_bias=bias, module=attention),
        *table_rows.head_norms(attention),
        *table_rows.norm("layers.{i}.post_attn_norm", f"{layer}.post_attention_layernorm"),
        *table_rows.norm("layers.{i}.mlp_norm", f"{layer}.pre_feedforward_layernorm"),
        *table_rows.gated_mlp(module=f"{prefix}{MLP}"),
        *table_rows.norm("layers.{i}.post_mlp_norm", f"{layer}.post_feedforward_layernorm"),
    )


def ropes(config: Config) -> tuple[Rope, ...]:
    """The ropes whose rotations the layers find in the batch: of those that see everything, of those with a window."""
    return (config.rope, config.local_rope)


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    return layers.embed(batch, params["embed"], scale=config.embed**0.5)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    window = config.windows[index]
    rotation = batch.rotations[0 if window is None else 1]
    attended, cache = layers.attention(
        qkv, batch, cache,
        norms=config.head_norms(p), rotation=rotation, scale=config.query_scale, window=window,
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
last_rows = decoder.last_rows
classify = decoder.classify
