"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219), Phi-3.5 and Phi-4 without experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Stored, Weight
from pallas_kernels.norm import Norm
from trtllm_jax.nn import decoder, layers
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.cache_group import CacheGroup
from trtllm_jax.nn.config_fields import require
from trtllm_jax.nn.decoder import ATTENTION, HEADS, LAYER, MLP, DecoderConfig, decoder_fields, layer_windows
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, rotary_channels

ARCHITECTURES = ("Phi3ForCausalLM",)

GGUF = (
    GgufArchitecture(
        name="phi3",
        model_type="phi3",
        model_class="Phi3ForCausalLM",
        tensors={
            "blk.{i}.attn_qkv": f"{ATTENTION}.qkv_proj",
            "blk.{i}.ffn_up": f"{MLP}.gate_up_proj",
        },
        metadata={"attention.sliding_window": "sliding_window"},
    ),
)


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Phi-3 model that its layers need; every layer has the same `window`, None for none."""

    rope: Rope
    window: int | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        no = (False, None)
        require(config, hidden_act=("silu",), attention_bias=no, mlp_bias=no, lm_head_bias=no)
        config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **_with_longrope(config)}
        if config.get("sliding_window") == 0:
            config["sliding_window"] = None  # GGUF files without a window state one of 0
        fields = decoder_fields(config)
        (window, *_) = layer_windows({**config, "layer_types": None}, fields["num_layers"])
        rope = Rope.from_config(config, rotary_channels(config, fields["head_dim"]))
        return cls(**fields, rope=rope, window=window)


def _with_longrope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the present name of LongRoPE, which older files call su or yarn."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(field)
    if isinstance(scaling, dict) and (scaling.get("rope_type") or scaling.get("type")) in ("su", "yarn"):
        scaling = {**scaling, "rope_type": "longrope"}
    return {"original_max_position_embeddings": 4096, **config, field: scaling}


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    qkv, gate_up = f"{ATTENTION}.qkv_proj.weight", f"{MLP}.gate_up_proj.weight"
    heads = "kv_heads group head_dim"
    return (
        *decoder.vocabulary(config),
        *decoder.norm("norm", "model.norm"),
        *decoder.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        Weight(
            "layers.{i}.qkv",
            "kv_heads qkv head_dim embed",
            tuple(Stored(qkv, "(kv_heads qkv head_dim) embed", size) for size in ("group", 1, 1)),
            fuse="qkv",
        ),
        Weight("layers.{i}.o", f"embed {heads}", (Stored(f"{ATTENTION}.o_proj.weight", f"embed ({heads})"),)),
        *decoder.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        Weight("layers.{i}.gate_up", "two mlp embed", (Stored(gate_up, "(two mlp) embed", 2),), fuse="two"),
        Weight("layers.{i}.down", "embed mlp", (Stored(f"{MLP}.down_proj.weight", "embed mlp"),)),
    )


def cache_spec(config: Config) -> tuple[CacheGroup, ...]:
    """One group: every layer sees as far."""
    return (CacheGroup(tuple(range(config.num_layers)), config.keys_and_values, config.window),)


def same_layer(config: Config, index: int) -> int:
    """The first layer that computes what layer `index` computes: they all do the same."""
    return 0


def ropes(config: Config) -> tuple[Rope, ...]:
    """The ropes whose rotations the layers find in the batch: one."""
    return (config.rope,)


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    return layers.embed(batch, params["embed"])


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, Norm(p["attn_norm"], config.eps), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed")
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5, window=config.window
    )
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS)
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, Norm(p["mlp_norm"], config.eps), batch)
        hidden = layers.gated(normed, p["gate_up"], batch)
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache


def last_rows(config: Config, params: Any, x: jax.Array) -> layers.Normed:
    """What `head` reads of rows [n, embed] of the residual stream after the last layer."""
    return layers.Normed(x, Norm(params["norm"], config.eps))


def head(config: Config, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
    """Logits [n, vocab] of rows of the residual stream after the last layer."""
    table = params.get("head", params["embed"])
    return layers.logits(last_rows(config, params, x), table, config.vocab, execution)
