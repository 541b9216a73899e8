"""GPT-BigCode: StarCoder (Li et al. 2023, arXiv:2305.06161), SantaCoder and Granite Code 20B and 34B."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Stored, Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, require
from trtllm_jax.nn.decoder import GPT2_NAMES, LayerNormConfig, activation, gpt2_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("GPTBigCodeForCausalLM", "GPTBigCodeForSequenceClassification")

LAYER = "transformer.h.{i}"
ATTENTION, MLP = f"{LAYER}.attn", f"{LAYER}.mlp"

GGUF = (
    GgufArchitecture(
        name="starcoder",
        model_type="gpt_bigcode",
        model_class="GPTBigCodeForCausalLM",
        tensors={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "blk.{i}.attn_norm": f"{LAYER}.ln_1",
            "blk.{i}.attn_qkv": f"{ATTENTION}.c_attn",
            "blk.{i}.attn_output": f"{ATTENTION}.c_proj",
            "blk.{i}.ffn_norm": f"{LAYER}.ln_2",
            "blk.{i}.ffn_up": f"{MLP}.c_fc",
            "blk.{i}.ffn_down": f"{MLP}.c_proj",
        },
        metadata={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        config={"activation_function": "gelu_pytorch_tanh"},
        derived=lambda config: {
            **{theirs: config[ours] for ours, theirs in GPT2_NAMES.items()},
            "multi_query": config["num_key_value_heads"] == 1,
        },
    ),
)


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one GPT-BigCode model that its layers need.

    Attributes:
        activation: of the feed-forward block.
        scaled: whether scores are divided by the square root of a head's channels.
    """

    activation: Activation
    scaled: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, add_cross_attention=(False,))
        config = {"multi_query": True, "scale_attn_weights": True, **config}
        # All query heads may share one key-value head (Shazeer 2019, arXiv:1911.02150).
        kv_heads = 1 if flag(config, "multi_query") else None
        return cls(
            **gpt2_fields(config, kv_heads=kv_heads),
            activation=activation(config, "gelu_pytorch_tanh", field="activation_function"),
            scaled=flag(config, "scale_attn_weights"),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | {"position": self.max_position}


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config, "transformer.wte"),
        Weight("positions", "position embed", (Stored("transformer.wpe.weight", "position embed"),)),
        *table_rows.norm("norm", "transformer.ln_f", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.ln_1", bias=True),
        *table_rows.fused_attention(config, f"{ATTENTION}.c_attn", f"{ATTENTION}.c_proj", bias=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.ln_2", bias=True),
        *table_rows.plain_mlp(f"{MLP}.c_fc", f"{MLP}.c_proj", bias=True),
    )


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    return layers.with_positions(layers.embed(batch, params["embed"]), params["positions"], batch.positions)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p["qkv_bias"])
    scale = config.head_dim**-0.5 if config.scaled else 1.0
    attended, cache = layers.attention(qkv, batch, cache, rotation=None, scale=scale)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p["o_bias"])
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p["up_bias"])
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p["down_bias"]), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.no_ropes
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
