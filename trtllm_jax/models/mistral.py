"""Mistral, Ministral, Ministral 3, and the text part of multimodal ones (Jiang et al. 2023, arXiv:2310.06825)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.error_text import short_repr
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import model_name, number, positive, require, text_config
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields, layer_windows
from trtllm_jax.nn.growing_scale import GrowingScale
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, scaling_of
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER, MLP

ARCHITECTURES = (
    "MistralForCausalLM", "MinistralForCausalLM", "Ministral3ForCausalLM", "Mistral3ForConditionalGeneration",
    "MistralForSequenceClassification", "MinistralForSequenceClassification", "Ministral3ForSequenceClassification",
)  # fmt: skip

IGNORED = ("vision_tower.*", "multi_modal_projector.*")
"""Tensors of what sees pictures, which nothing reads."""

OF_TEXT = {"mistral": "Mistral", "ministral3": "Ministral3"}
"""The models that are the language model of one that sees pictures, by their `model_type`."""

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
"""What fields that are absent mean."""

YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
DEFAULTS_3 = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5}
"""What fields that are absent mean in Ministral 3."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Mistral model that its layers need.

    Attributes:
        prefix: what the names of its tensors start with.
        rope: of every layer.
        query_scale: by which queries grow with their position; None if they do not.
    """

    prefix: str
    rope: Rope
    query_scale: GrowingScale | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        name, nested = model_name(config), "text_config" in config
        if nested:
            config = text_config(config)
            require(config, model_type=tuple(OF_TEXT))
            name = OF_TEXT[config.get("model_type", "mistral")]
        config = {**(DEFAULTS_3 if name == "Ministral3" else DEFAULTS), **config}
        if name == "Ministral3" and config.get("rope_parameters") is None:
            config["rope_parameters"] = YARN
        require(config, hidden_act=("silu",))
        fields = decoder_fields(config)
        windows = fields["windows"] = layer_windows(config, fields["num_layers"])
        if name != "Ministral":
            _require_one_window(config, windows)
        return cls(
            **fields,
            prefix="language_model." if nested else "",
            rope=Rope.from_config(config, fields["head_dim"]),
            query_scale=_query_scale(config) if name == "Ministral3" else None,
        )


def _query_scale(config: Mapping[str, Any]) -> GrowingScale | None:
    """That of the configuration's rope; None if it states no `llama_4_scaling_beta` above 0."""
    rope = scaling_of(config)
    beta = number(rope, "llama_4_scaling_beta", default=0.0)
    return GrowingScale(beta, positive(rope, "original_max_position_embeddings"), rounded=True) if beta else None


def _require_one_window(config: Mapping[str, Any], windows: tuple[int | None, ...]) -> None:
    """Refuse layers of two kinds under Mistral's own name, by which transformers gives all the same window."""
    if windows != layer_windows({**config, "layer_types": None}, len(windows)):
        kinds = short_repr(config["layer_types"])
        raise ValueError(f"config.json has layer_types={kinds}, which only Ministral has")


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    prefix = config.prefix
    return (
        *table_rows.vocabulary(config, f"{prefix}model.embed_tokens", f"{prefix}lm_head"),
        *table_rows.norm("norm", f"{prefix}model.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{prefix}{LAYER}.input_layernorm"),
        *table_rows.attention(module=f"{prefix}{ATTENTION}"),
        *table_rows.norm("layers.{i}.mlp_norm", f"{prefix}{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(module=f"{prefix}{MLP}"),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed")
    if config.query_scale is not None:
        qkv = config.query_scale.scaled(qkv, batch.positions)
    attended, cache = layers.attention(
        qkv, batch, cache,
        rotation=batch.rotations[0], scale=config.head_dim**-0.5, window=config.windows[index],
    )  # fmt: skip
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS)
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
