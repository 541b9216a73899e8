"""An architecture of the tests: Llama with heads that are normalised before they are rotated, as Qwen3's are."""

from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.table import Stored, Weight
from pallas_kernels.norm import Norm
from trtllm_jax.models import llama
from trtllm_jax.models.llama import HEADS, Config, cache_spec, embed, head, last_rows, ropes, same_layer
from trtllm_jax.nn import layers
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.layers import Residual

__all__ = ["Config", "cache_spec", "embed", "head", "last_rows", "layer", "ropes", "same_layer", "table"]


def table(config: Config) -> tuple[Weight, ...]:
    names = ("q_norm", "k_norm")
    norms = (Stored(f"model.layers.{{i}}.self_attn.{name}.weight", "head_dim") for name in names)
    rows = (Weight(f"layers.{{i}}.{name}", "head_dim", (norm,)) for name, norm in zip(names, norms, strict=True))
    return (*llama.table(config), *rows)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    residual, normed = layers.normalised(residual, Norm(p["attn_norm"], config.eps), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed")
    queries = layers.norm(qkv[:, :, :-2], Norm(p["q_norm"], config.eps), batch)
    keys = layers.norm(qkv[:, :, -2:-1], Norm(p["k_norm"], config.eps), batch)
    qkv = jnp.concatenate([queries, keys, qkv[:, :, -1:]], axis=2)
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS)
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, Norm(p["mlp_norm"], config.eps), batch)
        hidden = layers.gated(normed, p["gate_up"], batch)
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp"), cache
