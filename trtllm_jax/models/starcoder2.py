"""StarCoder2 (Lozhkov et al. 2024, arXiv:2402.19173)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.gguf_architecture import GgufArchitecture
from checkpoints.table import Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag
from trtllm_jax.nn.decoder import LayerNormConfig, activation, decoder_fields, layer_windows
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import HEADS, LAYER, MLP

ARCHITECTURES = ("Starcoder2ForCausalLM", "Starcoder2ForSequenceClassification")

GGUF = (
    GgufArchitecture(
        name="starcoder2",
        model_type="starcoder2",
        model_class="Starcoder2ForCausalLM",
        tensors={"blk.{i}.ffn_up": f"{MLP}.c_fc", "blk.{i}.ffn_down": f"{MLP}.c_proj"},
        metadata={"attention.layer_norm_epsilon": "norm_epsilon", "attention.sliding_window": "sliding_window"},
        # The window of every published model, which llama.cpp does not write.
        config={"hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096},
        derived=lambda config: {"use_bias": config["attention_bias"]},
    ),
)


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one StarCoder2 model that its layers need.

    Attributes:
        rope: of every layer.
        bias: whether the projections have a bias; norms always have.
        activation: of the feed-forward block.
    """

    rope: Rope
    bias: bool
    activation: Activation

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        defaults = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "use_bias": True}
        config = {**defaults, **config}
        fields = decoder_fields(config, eps="norm_epsilon", tied=True)
        fields["windows"] = layer_windows({**config, "layer_types": None}, fields["num_layers"])
        return cls(
            **fields,
            rope=Rope.from_config(config, fields["head_dim"]),
            bias=flag(config, "use_bias"),
            activation=activation(config, "gelu_pytorch_tanh"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config),
        *table_rows.norm("norm", "model.norm", bias=True),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm", bias=True),
        *table_rows.attention(bias=config.bias, output_bias=config.bias),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm", bias=True),
        *table_rows.plain_mlp(f"{MLP}.c_fc", f"{MLP}.c_proj", bias=config.bias),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5, window=config.windows[index]
    )
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p.get("up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
