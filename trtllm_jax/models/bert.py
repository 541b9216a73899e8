"""BERT (Devlin et al. 2018, arXiv:1810.04805), RoBERTa and XLM-RoBERTa: embeddings, and classes of texts and pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.table import Stored, Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import count, model_name, positive, require
from trtllm_jax.nn.decoder import LayerNormConfig, activation, decoder_fields, require_whole_heads
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = (
    "BertModel", "BertForSequenceClassification", "RobertaModel", "RobertaForSequenceClassification",
    "XLMRobertaModel", "XLMRobertaForSequenceClassification",
)  # fmt: skip

IGNORED = ("*embeddings.position_ids", "*embeddings.token_type_ids", "*pooler.*", "cls.*", "lm_head.*")
"""Buffers, and heads for other tasks."""


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one BERT model that its layers need.

    Attributes:
        prefix: what the names of its tensors start with.
        positions: rows of the table of positions.
        first_position: the row of a sequence's first token.
        types: segments that a token may belong to.
        activation: of the feed-forward block.
    """

    prefix: str
    positions: int
    first_position: int
    types: int
    activation: Activation

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | {"positions": self.positions, "types": self.types, "pooled": self.embed}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(config, position_embedding_type=("absolute", None), is_decoder=(False, None))
        name = model_name(config) or "BertModel"
        family = "bert" if name.startswith("Bert") else "roberta"
        positions = positive(config, "max_position_embeddings", default=512)
        # RoBERTa's first rows are those of padding.
        first = 0 if family == "bert" else count({"pad_token_id": 1, **config}, "pad_token_id") + 1
        if first >= positions:
            raise ValueError(
                f"config.json has max_position_embeddings={positions}, which leaves no row after those of padding, "
                f"pad_token_id={first - 1}"
            )
        fields = decoder_fields({**config, "head_dim": None, "num_key_value_heads": None}, eps="layer_norm_eps")
        require_whole_heads(config)
        return cls(
            **fields | {"tied": True, "max_position": positions - first},
            prefix="" if name.endswith("Model") else f"{family}.",
            positions=positions,
            first_position=first,
            types=positive(config, "type_vocab_size", default=2),
            activation=activation(config, "gelu"),
        )


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    embeddings, layer = f"{config.prefix}embeddings", f"{config.prefix}encoder.layer.{{i}}"
    rows = [
        Weight("embed", "vocab embed", (Stored(f"{embeddings}.word_embeddings.weight", "vocab embed"),)),
        *(
            Weight(
                f"{name}s", f"{name}s embed", (Stored(f"{embeddings}.{stored}_embeddings.weight", f"{name}s embed"),)
            )
            for name, stored in (("position", "position"), ("type", "token_type"))
        ),
        *table_rows.norm("norm", f"{embeddings}.LayerNorm", bias=True),
        *table_rows.attention(
            bias=True,
            output_bias=True,
            module=f"{layer}.attention",
            names=("self.query", "self.key", "self.value"),
            output="output.dense",
        ),
        *table_rows.norm("layers.{i}.attn_norm", f"{layer}.attention.output.LayerNorm", bias=True),
        *table_rows.plain_mlp(f"{layer}.intermediate.dense", f"{layer}.output.dense", bias=True),
        *table_rows.norm("layers.{i}.mlp_norm", f"{layer}.output.LayerNorm", bias=True),
    ]
    if config.labels:
        bert = config.prefix == "bert."
        dense, classes = ("bert.pooler.dense", "classifier") if bert else ("classifier.dense", "classifier.out_proj")
        rows += [
            Weight("pooler", "pooled embed", (Stored(f"{dense}.weight", "pooled embed"),)),
            Weight("pooler_bias", "pooled", (Stored(f"{dense}.bias", "pooled"),)),
            Weight("head", "labels embed", (Stored(f"{classes}.weight", "labels embed"),)),
            Weight("head_bias", "labels", (Stored(f"{classes}.bias", "labels"),)),
        ]
    return tuple(rows)


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer: embeddings of tokens, segments and positions."""
    x = layers.embed(batch, params["embed"]).x
    types = params["types"][0] if batch.token_types is None else params["types"][batch.token_types]
    x = x + types.astype(x.dtype) + params["positions"][batch.positions + config.first_position].astype(x.dtype)
    return Residual(layers.norm(x, config.norm(params, "norm"), batch))


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`; each block ends with a norm of the stream itself."""
    qkv = layers.linear(residual.x, p["qkv"], batch, "embed", bias=p["qkv_bias"])
    attended, cache = layers.attention(qkv, batch, cache, rotation=None, scale=config.head_dim**-0.5, causal=False)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p["o_bias"])
    residual = Residual(layers.norm(residual.total, config.norm(p, "attn_norm"), batch))
    with jax.named_scope("mlp"):
        hidden = layers.activated(layers.Normed(residual.x, None), p["up"], batch, config.activation, p["up_bias"])
        residual = layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p["down_bias"])
        return Residual(layers.norm(residual.total, config.norm(p, "mlp_norm"), batch)), cache


def last_rows(config: Config, params: Any, x: jax.Array) -> layers.Normed:
    """The hidden states of rows [n, embed] of the residual stream: they are normalised already."""
    return layers.Normed(x, None)


def classify(config: Config, params: Any, x: jax.Array, lengths: jax.Array, execution: Execution) -> jax.Array:
    """The logits [b, labels] of sequences with hidden states [b, s, embed]: of the first token of each."""
    pooled = layers.projected(layers.Normed(x[:, 0], None), params["pooler"], execution, params["pooler_bias"])
    first = layers.Normed(jnp.tanh(pooled), None)
    return layers.projected(first, params["head"], execution, params["head_bias"])


cache_spec = decoder.no_cache
same_layer = decoder.same_layer
ropes = decoder.no_ropes
