"""OLMo 2 (OLMo team 2025, arXiv:2501.00656), and OLMo 3, which adds windows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Stored, Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, model_name, require
from trtllm_jax.nn.decoder import FULL, SLIDING, DecoderConfig, decoder_fields, layer_windows
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, of_layer_type
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER

ARCHITECTURES = (
    "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Olmo2ForSequenceClassification", "Olmo3ForSequenceClassification",
)  # fmt: skip

GGUF = (
    GgufArchitecture(
        name="olmo2",
        model_type="olmo2",
        model_class="Olmo2ForCausalLM",
        tensors={
            "blk.{i}.attn_q_norm": f"{ATTENTION}.q_norm",
            "blk.{i}.attn_k_norm": f"{ATTENTION}.k_norm",
            "blk.{i}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
            "blk.{i}.post_ffw_norm": f"{LAYER}.post_feedforward_layernorm",
        },
        # Files of OLMo 3 have it; that they are refused is better than to ignore it.
        metadata={"attention.sliding_window": "sliding_window"},
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one OLMo model that its layers need.

    Attributes:
        full_rope: the rope of layers that see everything.
        sliding_rope: the rope of layers with a window.
        attention_bias: whether the four projections of attention have a bias.
    """

    full_rope: Rope
    sliding_rope: Rope
    attention_bias: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",))
        if model_name(config) == "Olmo3":
            base = ("rope_theta", 500000.0)
            full, sliding = of_layer_type(config, FULL, base), of_layer_type(config, SLIDING, base, scaled=False)
            fields = decoder_fields({"rms_norm_eps": 1e-5, **full})
            windowed = {"sliding_window": 4096, **config}
            fields["windows"] = layer_windows(windowed, fields["num_layers"], lambda index: (index + 1) % 4 != 0)
        else:
            require(config, sliding_window=(None,))
            full = sliding = dict(config)
            fields = decoder_fields({"rms_norm_eps": 1e-5, **config})
        return cls(
            **fields,
            full_rope=Rope.from_config(full, fields["head_dim"]),
            sliding_rope=Rope.from_config(sliding, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    heads = "(kv_heads qkv head_dim)"
    norms = (Stored(f"{ATTENTION}.q_norm.weight", heads, "group"), Stored(f"{ATTENTION}.k_norm.weight", heads))
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm"),
        *table_rows.attention(bias=config.attention_bias, output_bias=config.attention_bias),
        Weight("layers.{i}.qk_norm", "kv_heads qkv head_dim", norms, fuse="qkv"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.post_attention_layernorm"),
        *table_rows.gated_mlp(),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_feedforward_layernorm"),
    )


def ropes(config: Config) -> tuple[Rope, ...]:
    """The ropes whose rotations the layers find in the batch: of layers without a window, and with one."""
    return (config.full_rope, config.sliding_rope)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens; a block ends with its norm."""
    window = config.windows[index]
    residual = Residual(residual.total)
    qkv = layers.linear(residual.x, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    heads = config.kv_heads * config.group
    qkv = layers.normalised_across_heads(qkv, p["qk_norm"], batch, heads=heads, eps=config.eps)
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=batch.rotations[window is not None], scale=config.head_dim**-0.5, window=window
    )
    rows = layers.linear(attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    residual = Residual(residual.x + layers.norm(rows, config.norm(p, "attn_norm"), batch))
    with jax.named_scope("mlp"):
        hidden = layers.gated(layers.Normed(residual.x, None), p["gate_up"], batch)
        rows = layers.linear(hidden, p["down"], batch, "mlp")
        return layers.add(residual, layers.norm(rows, config.norm(p, "mlp_norm"), batch)), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
