"""An architecture of the tests with what Gemma 2 has and Llama has not.

Norm weights are stored less one, blocks are normalised on both sides, gates are GELUs, scores and logits are capped,
every other layer sees a window only, and embeddings are scaled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.table import Stored, Weight
from pallas_kernels.norm import Norm
from trtllm_jax.models import llama
from trtllm_jax.models.llama import HEADS, ropes
from trtllm_jax.nn import layers
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual

__all__ = ["Config", "cache_spec", "embed", "head", "last_rows", "layer", "ropes", "same_layer", "table"]


@dataclass(frozen=True)
class Config(llama.Config):
    query_scale: float = 1.0
    window: int = 0
    score_cap: float = 0.0
    logit_cap: float = 0.0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        of_llama = llama.Config.from_hf({**config, "hidden_act": "silu"})
        return cls(
            **vars(of_llama) | {"tied": True},
            query_scale=config["query_pre_attn_scalar"] ** -0.5,
            window=config["sliding_window"],
            score_cap=config["attn_logit_softcapping"],
            logit_cap=config["final_logit_softcapping"],
        )


BLOCK_NORMS = {
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def table(config: Config) -> tuple[Weight, ...]:
    rows = (
        Weight(f"layers.{{i}}.{path}", "embed", (Stored(f"model.layers.{{i}}.{name}.weight", "embed"),))
        for path, name in BLOCK_NORMS.items()
    )
    return (*(row for row in llama.table(config) if row.path != "layers.{i}.mlp_norm"), *rows)


def cache_spec(config: Config) -> tuple[CacheGroup, ...]:
    kept = KeysAndValues(config.kv_heads, config.head_dim)
    return tuple(
        CacheGroup(tuple(range(first, config.num_layers, 2)), kept, window)
        for first, window in enumerate((config.window, None))
    )


def same_layer(config: Config, index: int) -> int:
    return index % 2


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    return layers.embed(batch, params["embed"], scale=config.embed**0.5)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    def norm(name: str) -> Norm:
        return Norm(p[name], config.eps, offset=1.0)

    residual, normed = layers.normalised(residual, norm("attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed")
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=batch.rotations[0], scale=config.query_scale, soft_cap=config.score_cap,
        window=None if index else config.window,
    )  # fmt: skip
    rows = layers.linear(attended, p["o"], batch, *HEADS)
    residual = layers.add(residual, layers.norm(rows, norm("post_attn_norm"), batch))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, norm("mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, activation="gelu_tanh")
        rows = layers.linear(hidden, p["down"], batch, "mlp")
        return layers.add(residual, layers.norm(rows, norm("post_mlp_norm"), batch)), cache


def last_rows(config: Config, params: Any, x: jax.Array) -> layers.Normed:
    return layers.Normed(x, Norm(params["norm"], config.eps, offset=1.0))


def head(config: Config, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
    rows = last_rows(config, params, x)
    return layers.logits(rows, params["embed"], config.vocab, execution, soft_cap=config.logit_cap)
