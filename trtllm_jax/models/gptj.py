"""GPT-J (Wang and Komatsuzaki 2021), and models of the same layers such as Dolly 1."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.table import Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import positive, require
from trtllm_jax.nn.decoder import LayerNormConfig, activation, gpt2_fields
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import PAIRED_HEADS, paired_sizes

ARCHITECTURES = ("GPTJForCausalLM", "GPTJForSequenceClassification")

IGNORED = ("transformer.h.*.attn.bias",)
"""The causal mask, which older files have."""

LAYER = "transformer.h.{i}"


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one GPT-J model that its layers need.

    Attributes:
        rope: of every layer, for the first `rotary` channels of each head.
        rotary: how many channels of a head are rotated.
        activation: of the feed-forward block.
    """

    rope: Rope
    rotary: int
    activation: Activation

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, rope_scaling=(None,), rope_parameters=(None,))
        fields = gpt2_fields({"n_positions": 2048, "tie_word_embeddings": False, **config})
        rotary = positive(config, "rotary_dim", default=64)
        paired_sizes(fields["head_dim"], rotary)  # are refused here
        return cls(
            **fields,
            rope=Rope.from_config({}, rotary),
            rotary=rotary,
            activation=activation(config, "gelu_new", field="activation_function"),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | paired_sizes(self.head_dim, self.rotary)


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    return (
        *table_rows.vocabulary(config, "transformer.wte", bias=True),
        *table_rows.norm("norm", "transformer.ln_f", bias=True),
        *table_rows.norm("layers.{i}.norm", f"{LAYER}.ln_1", bias=True),
        *table_rows.attention(module=f"{LAYER}.attn", output="out_proj", paired=True),
        *table_rows.plain_mlp(f"{LAYER}.mlp.fc_in", f"{LAYER}.mlp.fc_out", bias=True),
    )


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, whose two blocks read the same rows, and its cache with this batch's."""
    residual, normed = layers.normalised(residual, config.norm(p, "norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed")
    qkv = qkv.reshape(*qkv.shape[:3], config.head_dim)
    attended, cache = layers.attention(qkv, batch, cache, rotation=batch.rotations[0], scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *PAIRED_HEADS)
    with jax.named_scope("mlp"):
        hidden = layers.activated(normed, p["up"], batch, config.activation, bias=p["up_bias"])
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p["down_bias"]), cache


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
classify = decoder.classify
head = decoder.head
