"""OPT (Zhang et al. 2022, arXiv:2205.01068); in the one of 350M the norms are behind the blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from checkpoints.table import Stored, Weight
from pallas_kernels.matmul import Activation
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.config_fields import flag, positive, require
from trtllm_jax.nn.decoder import LayerNormConfig, activation, decoder_fields, require_whole_heads
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Normed, Residual
from trtllm_jax.nn.pooling import last_token
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("OPTForCausalLM", "OPTForSequenceClassification")

DECODER = "model.decoder"
LAYER = f"{DECODER}.layers.{{i}}"

FIRST_POSITION = 2
"""The row of the table of positions that belongs to the first token."""


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The facts of one OPT model that its layers need.

    Attributes:
        activation: of the feed-forward blocks.
        bias: whether all projections have a bias.
        norms_first: whether norms are before the blocks and behind the last layer, or behind each block.
        word_embed: channels of the embeddings, which are projected to those of the residual stream where they differ.
    """

    activation: Activation
    bias: bool
    norms_first: bool
    word_embed: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(
            config,
            _remove_final_layer_norm=(False,),
            layer_norm_elementwise_affine=(True,),
        )
        config = {"enable_bias": True, "do_layer_norm_before": True, **config}
        config["intermediate_size"] = positive(config, "ffn_dim")
        fields = decoder_fields({**config, "num_key_value_heads": None, "head_dim": None}, tied=True)
        require_whole_heads(config)
        return cls(
            **(fields | {"eps": 1e-5}),
            activation=activation(config, "relu", field="activation_function"),
            bias=flag(config, "enable_bias"),
            norms_first=flag(config, "do_layer_norm_before"),
            word_embed=positive(config, "word_embed_proj_dim", default=fields["embed"]),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        return super().sizes | {"position": FIRST_POSITION + self.max_position, "word_embed": self.word_embed}

    @property
    def projects(self) -> bool:
        """Whether embeddings are projected to the residual stream, and its rows back."""
        return self.word_embed != self.embed


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    rows = [
        *table_rows.vocabulary(config, f"{DECODER}.embed_tokens", channels="word_embed"),
        _row("positions", "embed_positions", "position embed"),
        *table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.self_attn_layer_norm", bias=True),
        *table_rows.attention(
            bias=config.bias, output_bias=config.bias, module=f"{LAYER}.self_attn", output="out_proj"
        ),
        *table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.final_layer_norm", bias=True),
        *table_rows.plain_mlp(f"{LAYER}.fc1", f"{LAYER}.fc2", bias=config.bias),
    ]
    if config.norms_first:
        rows += table_rows.norm("norm", f"{DECODER}.final_layer_norm", bias=True)
    if config.projects:
        rows.append(_row("project_in", "project_in", "embed word_embed"))
        rows.append(_row("project_out", "project_out", "word_embed embed"))
    return tuple(rows)


def _row(path: str, module: str, axes: str) -> Weight:
    """A weight of no layer that is stored as it is."""
    return Weight(path, axes, (Stored(f"{DECODER}.{module}.weight", axes),))


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer."""
    tokens = layers.embed(batch, params["embed"])
    if config.projects:
        tokens = Residual(layers.linear(tokens.x, params["project_in"], batch, "word_embed"))
    return layers.with_positions(tokens, params["positions"], FIRST_POSITION + batch.positions)


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache with this batch's tokens."""
    residual, rows = _before_block(config, p, "attn_norm", residual, batch)
    qkv = layers.linear(rows, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    attended, cache = layers.attention(qkv, batch, cache, rotation=None, scale=config.head_dim**-0.5)
    residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    residual = _behind_block(config, p, "attn_norm", residual, batch)
    with jax.named_scope("mlp"):
        residual, rows = _before_block(config, p, "mlp_norm", residual, batch)
        hidden = layers.activated(rows, p["up"], batch, config.activation, bias=p.get("up_bias"))
        residual = layers.add_linear(residual, hidden, p["down"], batch, "mlp", bias=p.get("down_bias"))
        return _behind_block(config, p, "mlp_norm", residual, batch), cache


def _before_block(config: Config, p: Any, name: str, residual: Residual, batch: Batch) -> tuple[Residual, Normed]:
    """The residual stream, and what a block reads of it: its rows, which this norm may be before."""
    if config.norms_first:
        return layers.normalised(residual, config.norm(p, name), batch)
    return residual, Normed(residual.total, None)


def _behind_block(config: Config, p: Any, name: str, residual: Residual, batch: Batch) -> Residual:
    """The residual stream after a block, which this norm may be behind."""
    return residual if config.norms_first else Residual(layers.norm(residual.total, config.norm(p, name), batch))


def last_rows(config: Config, params: Any, x: jax.Array) -> Normed:
    """What `head` reads of rows [n, embed] of the residual stream after the last layer, [n, word_embed]."""
    rows = decoder.last_rows(config, params, x) if config.norms_first else Normed(x, None)
    if config.projects:
        # No execution says here whether kernels may run.
        rows = Normed(layers.projected(rows, params["project_out"], Execution(xla_only=True)), None)
    return rows


def classify(config: Config, params: Any, x: jax.Array, lengths: jax.Array, execution: Execution) -> jax.Array:
    """The logits [b, labels] of sequences with hidden states [b, s, embed]: of the last token of each."""
    return layers.projected(last_rows(config, params, last_token(x, lengths)), params["head"], execution)


def head(config: Config, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
    """Logits [n, vocab] of rows of the residual stream after the last layer."""
    table = params.get("head", params["embed"])
    return layers.logits(last_rows(config, params, x), table, config.vocab, execution)


cache_spec = decoder.cache_spec
same_layer = decoder.same_layer
ropes = decoder.no_ropes
