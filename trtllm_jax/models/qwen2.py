"""Qwen2 and Qwen2.5, their Coder and Math models too (Yang et al. 2024, arXiv:2407.10671)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from pallas_kernels.norm import Norm
from trtllm_jax.nn import decoder, layers
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.cache_group import CacheGroup
from trtllm_jax.nn.config_fields import require
from trtllm_jax.nn.decoder import HEADS, LAYER, DecoderConfig, decoder_fields, switched_windows
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope

ARCHITECTURES = ("Qwen2ForCausalLM",)

GGUF = (GgufArchitecture(name="qwen2", model_type="qwen2", model_class="Qwen2ForCausalLM"),)

DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
"""What fields that are absent mean."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Qwen2 model that its layers need; `windows` has each layer's, None for all tokens."""

    rope: Rope
    windows: tuple[int | None, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        require(config, hidden_act=("silu",))
        fields = decoder_fields(config)
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            windows=switched_windows(config, fields["num_layers"]),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *decoder.vocabulary(config),
        *decoder.norm("norm", "model.norm"),
        *decoder.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm"),
        *decoder.attention(bias=True),
        *decoder.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm"),
        *decoder.gated_mlp(),
    )


def cache_spec(config: Config) -> tuple[CacheGroup, ...]:
    """A group for layers that see everything, and one for those with a window."""
    return decoder.cache_groups(config, config.windows)


def same_layer(config: Config, index: int) -> int:
    """The first layer that computes what layer `index` computes: one of the same window."""
    return config.windows.index(config.windows[index])


def ropes(config: Config) -> tuple[Rope, ...]:
    """The ropes whose rotations the layers find in the batch: one."""
    return (config.rope,)


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    return layers.embed(batch, params["embed"])


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, Norm(p["attn_norm"], config.eps), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p["qkv_bias"])
    attended, cache = layers.attention(
        qkv, batch, cache,
        rotation=batch.rotations[0], scale=config.head_dim**-0.5, window=config.windows[index],
    )  # fmt: skip
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
