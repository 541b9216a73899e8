"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): embeddings, and classes of texts and pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax

from checkpoints.table import Stored, Weight
from pallas_kernels.matmul import ACTIVATIONS, Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, model_name, positive, require
from trtllm_jax.nn.decoder import (
    FULL,
    SLIDING,
    LayerNormConfig,
    activation,
    decoder_fields,
    layer_windows,
    require_whole_heads,
)
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.pooling import How, pooled
from trtllm_jax.nn.rope import Rope, of_layer_type
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("ModernBertModel", "ModernBertForSequenceClassification")

IGNORED = ("head.*", "decoder.*")
"""The head that predicts masked tokens."""

DEFAULTS = {
    "num_hidden_layers": 22, "norm_eps": 1e-5, "max_position_embeddings": 8192, "local_attention": 128,
    "global_attn_every_n_layers": 3, "num_key_value_heads": None, "head_dim": None,
}  # fmt: skip
"""What fields that are absent mean, and those that it does not have."""


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one ModernBERT model that its layers need.

    Attributes:
        prefix: what the names of its tensors start with.
        rope: of the layers that see everything.
        local_rope: of those with a window.
        norm_bias: whether norms have biases.
        attention_bias: whether attention's projections have biases.
        mlp_bias: whether those of the feed-forward block have biases.
        activation: of the gate.
        pooling: how a classifier makes one vector of the hidden states.
        classifier_bias: whether its first projection has a bias.
        classifier_activation: what follows that projection.
    """

    prefix: str
    rope: Rope
    local_rope: Rope
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    activation: Activation
    pooling: How
    classifier_bias: bool
    classifier_activation: Activation

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | {"pooled": self.embed}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        config = {**DEFAULTS, **config}
        require(config, classifier_pooling=("cls", "mean"))
        fields = decoder_fields({**config, "rope_parameters": None, "rope_scaling": None}, eps="norm_eps")
        require_whole_heads(config)
        # local_attention counts the tokens on both sides; a window is a token's own and those on one side.
        windowed = {**config, "sliding_window": positive(config, "local_attention") // 2 + 1}
        period = positive(config, "global_attn_every_n_layers")
        fields["windows"] = layer_windows(windowed, fields["num_layers"], lambda index: index % period != 0)
        full = of_layer_type(config, FULL, ("global_rope_theta", 160000.0))
        local = of_layer_type(config, SLIDING, ("local_rope_theta", 10000.0), scaled=False)
        named = model_name(config) or "ModernBertModel"
        return cls(
            **fields | {"tied": True},
            prefix="" if named == "ModernBertModel" else "model.",
            rope=Rope.from_config(full, fields["head_dim"]),
            local_rope=Rope.from_config(local, fields["head_dim"]),
            norm_bias=flag(config, "norm_bias"),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            activation=activation(config, "gelu", field="hidden_activation"),
            pooling=cast(How, config.get("classifier_pooling", "cls")),
            classifier_bias=flag(config, "classifier_bias"),
            classifier_activation=activation(config, "gelu", field="classifier_activation"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    prefix, layer, bias = config.prefix, f"{config.prefix}layers.{{i}}", config.norm_bias
    rows = [
        Weight("embed", "vocab embed", (Stored(f"{prefix}embeddings.tok_embeddings.weight", "vocab embed"),)),
        *table_rows.norm("embed_norm", f"{prefix}embeddings.norm", bias=bias),
        *table_rows.norm("norm", f"{prefix}final_norm", bias=bias),
        *table_rows.fused_attention(
            config, f"{layer}.attn.Wqkv", f"{layer}.attn.Wo", bias=config.attention_bias, stacked=True
        ),
        *table_rows.norm("layers.{i}.mlp_norm", f"{layer}.mlp_norm", bias=bias),
        *table_rows.stacked_mlp(f"{layer}.mlp.Wi", f"{layer}.mlp.Wo", bias=config.mlp_bias),
    ]
    for index in range(1, config.num_layers):  # the first layer reads what the embeddings' norm made
        rows += table_rows.norm(f"layers.{index}.attn_norm", f"{prefix}layers.{index}.attn_norm", bias=bias)
    if config.labels:
        rows += [
            Weight("pooler", "pooled embed", (Stored("head.dense.weight", "pooled embed"),)),
            *table_rows.norm("pooler_norm", "head.norm", axis="pooled", bias=bias),
            Weight("head", "labels pooled", (Stored("classifier.weight", "labels pooled"),)),
            Weight("head_bias", "labels", (Stored("classifier.bias", "labels"),)),
        ]
        if config.classifier_bias:
            rows.append(Weight("pooler_bias", "pooled", (Stored("head.dense.bias", "pooled"),)))
    return tuple(rows)


def same_layer(config: Config, index: int) -> int:
    """The first layer that computes what layer `index` computes: one of the same window, and the first is alone."""
    return 0 if index == 0 else 1 + config.windows[1:].index(config.windows[index])


def ropes(config: Config) -> tuple[Rope, ...]:
    """The ropes whose rotations the layers find in the batch: of those that see everything, of those with a window."""
    return (config.rope, config.local_rope)


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    x = layers.embed(batch, params["embed"]).x
    return Residual(layers.norm(x, config.norm(params, "embed_norm"), batch))


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`."""
    normed = layers.Normed(residual.total, None)
    if index:
        residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    window = config.windows[index]
    rotation = batch.rotations[0 if window is None else 1]
    attended, cache = layers.attention(
        qkv, batch, cache, rotation=rotation, scale=config.head_dim**-0.5, window=window, causal=False
    )
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"], batch, config.activation, p.get("gate_up_bias"))
        return layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias")), cache


def classify(config: Config, params: Any, x: jax.Array, lengths: jax.Array, execution: Execution) -> jax.Array:
    """The logits [b, labels] of sequences with hidden states [b, s, embed]: of one vector for each."""
    rows = layers.float_rows(last_rows(config, params, x.reshape(-1, x.shape[-1])))
    vectors = pooled(rows.reshape(x.shape), lengths, config.pooling).astype(x.dtype)
    dense = layers.projected(layers.Normed(vectors, None), params["pooler"], execution, params.get("pooler_bias"))
    active = ACTIVATIONS[config.classifier_activation](dense)
    normed = layers.Normed(active, config.norm(params, "pooler_norm"))
    return layers.projected(normed, params["head"], execution, params["head_bias"])


cache_spec = decoder.no_cache
last_rows = decoder.last_rows
