"""EXAONE 4.0 (LG AI Research 2025, arXiv:2507.11407): layers that see everything do not rotate their heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import positive, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields, layer_windows
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER

ARCHITECTURES = ("Exaone4ForCausalLM", "Exaone4ForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="exaone4",
        model_type="exaone4",
        model_class="Exaone4ForCausalLM",
        tensors={
            "blk.{i}.attn_q_norm": f"{ATTENTION}.q_norm",
            "blk.{i}.attn_k_norm": f"{ATTENTION}.k_norm",
            "blk.{i}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
            "blk.{i}.post_ffw_norm": f"{LAYER}.post_feedforward_layernorm",
        },
        metadata={"attention.sliding_window": "sliding_window"},
        # Of files that state none. Those with one have it in three layers of four, as here and in llama.cpp.
        config={"sliding_window": None},
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one EXAONE 4.0 model that its layers need.

    Attributes:
        rope: of the layers that rotate their heads.
        rotate_all: whether layers without a window do too.
    """

    rope: Rope
    rotate_all: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",))
        defaults = {"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096}
        config = {**defaults, **config}
        fields = decoder_fields(config)
        if config["sliding_window"] is not None:
            every = 1 if config.get("layer_types") else positive(config, "sliding_window_pattern", default=4)
            fields["windows"] = layer_windows(config, fields["num_layers"], lambda index: (index + 1) % every != 0)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            rotate_all=config["sliding_window"] is None,
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.attention(),
        *table_rows.head_norms(),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_feedforward_layernorm"),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens; a block ends with its norm."""
    window = config.windows[index]
    residual = Residual(residual.total)
    qkv = layers.linear(residual.x, p["qkv"], batch, "embed")
    rotation = batch.rotations[0] if config.rotate_all or window is not None else None
    attended, cache = layers.attention(
        qkv, batch, cache,
        norms=config.head_norms(p), rotation=rotation, scale=config.head_dim**-0.5, window=window,
    )  # fmt: skip
    rows = layers.linear(attended, p["o"], batch, *HEADS)
    residual = Residual(residual.x + layers.norm(rows, config.norm(p, "attn_norm"), batch))
    with jax.named_scope("mlp"):
        hidden = layers.gated(layers.Normed(residual.x, None), p["gate_up"], batch)
        rows = layers.linear(hidden, p["down"], batch, "mlp")
        return layers.add(residual, layers.norm(rows, config.norm(p, "mlp_norm"), batch)), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
