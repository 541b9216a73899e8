"""Llama 1 to 3.x (Touvron et al. 2023, arXiv:2302.13971), and models of the same layers such as SmolLM2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Stored, Weight
from pallas_kernels.norm import Norm
from trtllm_jax.common.numbers import INT32_MAX
from trtllm_jax.nn import layers
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
from trtllm_jax.nn.config_fields import MAX_HEAD_DIM, MAX_LAYERS, flag, number, positive, require
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope, context_stretch

ARCHITECTURES = ("LlamaForCausalLM",)

GGUF = (
    GgufArchitecture(
        name="llama",
        model_type="llama",
        model_class="LlamaForCausalLM",
        permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
    ),
)

HEADS = ("kv_heads", "group", "head_dim")


@dataclass(frozen=True)
class Config:
    """The facts of one Llama model that its layers need."""

    vocab: int
    embed: int
    mlp: int
    num_layers: int
    kv_heads: int
    group: int
    head_dim: int
    eps: float
    rope: Rope
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    max_position: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, hidden_act=("silu",))
        heads = positive(config, "num_attention_heads")
        kv_heads = positive(config, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        embed = positive(config, "hidden_size")
        positions = positive(config, "max_position_embeddings", default=2048)
        head_dim = positive(config, "head_dim", default=embed // heads, most=MAX_HEAD_DIM)
        return cls(
            vocab=positive(config, "vocab_size"),
            embed=embed,
            mlp=positive(config, "intermediate_size"),
            num_layers=positive(config, "num_hidden_layers", most=MAX_LAYERS),
            kv_heads=kv_heads,
            group=heads // kv_heads,
            head_dim=head_dim,
            eps=number(config, "rms_norm_eps", default=1e-6),
            rope=Rope.from_config(config, head_dim),
            tied=flag(config, "tie_word_embeddings"),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            max_position=min(INT32_MAX, int(positions * context_stretch(config))),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        names = ("vocab", "embed", "mlp", "kv_heads", "group", "head_dim")
        return {name: getattr(self, name) for name in names} | {"layers": self.num_layers}


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    layer, attn, mlp = "model.layers.{i}", "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
    heads = "(kv_heads qkv head_dim)"

    def qkv(suffix: str, layout: str) -> tuple[Stored, ...]:
        sizes: dict[str, str | int] = {"q_proj": "group", "k_proj": 1, "v_proj": 1}
        return tuple(Stored(f"{attn}.{name}.{suffix}", layout, size) for name, size in sizes.items())

    def gate_up(suffix: str, layout: str) -> tuple[Stored, ...]:
        return tuple(Stored(f"{mlp}.{name}.{suffix}", layout, 1) for name in ("gate_proj", "up_proj"))

    weights = [
        Weight("embed", "vocab embed", (Stored("model.embed_tokens.weight", "vocab embed"),)),
        Weight("norm", "embed", (Stored("model.norm.weight", "embed"),)),
        Weight("layers.{i}.attn_norm", "embed", (Stored(f"{layer}.input_layernorm.weight", "embed"),)),
        Weight("layers.{i}.qkv", "kv_heads qkv head_dim embed", qkv("weight", f"{heads} embed"), fuse="qkv"),
        Weight(
            "layers.{i}.o",
            "embed kv_heads group head_dim",
            (Stored(f"{attn}.o_proj.weight", "embed (kv_heads group head_dim)"),),
        ),
        Weight("layers.{i}.mlp_norm", "embed", (Stored(f"{layer}.post_attention_layernorm.weight", "embed"),)),
        Weight("layers.{i}.gate_up", "two mlp embed", gate_up("weight", "(two mlp) embed"), fuse="two"),
        Weight("layers.{i}.down", "embed mlp", (Stored(f"{mlp}.down_proj.weight", "embed mlp"),)),
    ]
    if not config.tied:
        weights.append(Weight("head", "vocab embed", (Stored("lm_head.weight", "vocab embed"),)))
    if config.attention_bias:
        weights.append(Weight("layers.{i}.qkv_bias", "kv_heads qkv head_dim", qkv("bias", heads), fuse="qkv"))
        weights.append(Weight("layers.{i}.o_bias", "embed", (Stored(f"{attn}.o_proj.bias", "embed"),)))
    if config.mlp_bias:
        weights.append(Weight("layers.{i}.gate_up_bias", "two mlp", gate_up("bias", "(two mlp)"), fuse="two"))
        weights.append(Weight("layers.{i}.down_bias", "embed", (Stored(f"{mlp}.down_proj.bias", "embed"),)))
    return tuple(weights)


def cache_spec(config: Config) -> tuple[CacheGroup, ...]:
    """One group: every layer keeps every token's key and value."""
    return (CacheGroup(tuple(range(config.num_layers)), KeysAndValues(config.kv_heads, config.head_dim)),)


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
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, Norm(p["mlp_norm"], config.eps), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, bias=p.get("gate_up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


def last_rows(config: Config, params: Any, x: jax.Array) -> layers.Normed:
    """What `head` reads of rows [n, embed] of the residual stream after the last layer."""
    return layers.Normed(x, Norm(params["norm"], config.eps))


def head(config: Config, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
    """Logits [n, vocab] of rows of the residual stream after the last layer."""
    table = params.get("head", params["embed"])
    return layers.logits(last_rows(config, params, x), table, config.vocab, execution)
