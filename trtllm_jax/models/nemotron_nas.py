"""Llama-3.x-Nemotron 49B and 51B, whose layers differ (Bercovich et al. 2024, arXiv:2411.19146)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax

from checkpoints.error_text import short_repr
from checkpoints.table import Stored, Weight
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
from trtllm_jax.nn.config_fields import above_zero, flag, positive, require
from trtllm_jax.nn.decoder import DecoderConfig, decoder_fields, require_whole_heads
from trtllm_jax.nn.layers import Residual
from trtllm_jax.nn.rope import Rope
from trtllm_jax.nn.table_rows import ATTENTION, HEADS, LAYER, MLP

ARCHITECTURES = ("DeciLMForCausalLM",)

MULTIPLE = 256
"""Hidden channels of feed-forward blocks are rounded up to a multiple of this."""

LINEAR: Literal["linear"] = "linear"
"""A block that is one product."""


class Block(NamedTuple):
    """What a layer has: of attention and of the feed-forward block the size, `LINEAR` or None for nothing.

    Attributes:
        stored: the layer's number in the checkpoint.
        group: query heads of a key-value head.
        mlp: hidden channels.
    """

    stored: int
    group: int | Literal["linear"] | None
    mlp: int | Literal["linear"] | None


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Nemotron model that its layers need; `kv_heads` and `mlp` are the largest of any layer.

    Attributes:
        rope: of every layer.
        blocks: what each layer has; those that have nothing are left out.
    """

    rope: Rope
    blocks: tuple[Block, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names; heads and hidden channels are those of some layers."""
        heads, own = self.kv_heads * self.group, {"stream": self.embed}
        for block in self.blocks:
            if isinstance(block.group, int):
                own |= {f"kv_heads/{block.group}": heads // block.group, f"group/{block.group}": block.group}
            if isinstance(block.mlp, int):
                own[f"mlp/{block.mlp}"] = block.mlp
        return super().sizes | own

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        require(
            config,
            hidden_act=("silu",),
            attention_bias=(False,),
            mlp_bias=(False,),
            position_embedding_type=("rope", None),
        )
        blocks = _blocks(config)
        groups = [block.group for block in blocks if isinstance(block.group, int)]
        if not groups:
            raise ValueError("config.json has block_configs without attention in any layer; at least one must have it")
        kv_heads = positive(config, "num_attention_heads") // min(groups)
        widest = max((block.mlp for block in blocks if isinstance(block.mlp, int)), default=MULTIPLE)
        fields = decoder_fields({**config, "num_key_value_heads": kv_heads, "intermediate_size": widest})
        require_whole_heads(config)
        return cls(
            **fields | {"num_layers": len(blocks), "windows": (None,) * len(blocks)},
            rope=Rope.from_config(config, fields["head_dim"]),
            blocks=blocks,
        )


def _blocks(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """What each layer has, without those that have nothing."""
    num_layers, stated = positive(config, "num_hidden_layers"), config.get("block_configs")
    if not isinstance(stated, list) or len(stated) != num_layers:
        raise ValueError(
            f"config.json has block_configs={short_repr(stated)}; it must be a list of num_hidden_layers={num_layers} "
            "objects"
        )
    found = (_block(config, index, record) for index, record in enumerate(stated))
    return tuple(block for block in found if (block.group, block.mlp) != (None, None))


def _block(config: Mapping[str, Any], index: int, record: Any) -> Block:
    """What layer `index` has, by its record; fields are named in errors by where they are."""
    at = f"block_configs[{index}]"
    record = record if isinstance(record, dict) else {}
    attention = _part(record, "attention", at, "n_heads_in_group")
    group: int | Literal["linear"] | None = _replacement(attention, f"{at}.attention")
    if group is None and not flag(attention, f"{at}.attention.no_op"):
        heads, field = positive(config, "num_attention_heads"), f"{at}.attention.n_heads_in_group"
        group = positive(attention, field)
        if heads % group:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of {field}={group}")
    ffn = _part(record, "ffn", at, "ffn_mult")
    mlp: int | Literal["linear"] | None = _replacement(ffn, f"{at}.ffn")
    if mlp is None and not flag(ffn, f"{at}.ffn.no_op"):
        factor = above_zero(ffn, f"{at}.ffn.ffn_mult")
        if factor is None:
            raise ValueError(f"config.json lacks {at}.ffn.ffn_mult, which every feed-forward block must have")
        channels = int(2 * factor * positive(config, "hidden_size") / 3)
        mlp = -(-channels // MULTIPLE) * MULTIPLE
    return Block(index, group, mlp)


def _part(record: Mapping[str, Any], name: str, at: str, size: str) -> dict[str, Any]:
    """The fields of a record's part by their whole names; ValueError for one that is set and not computed here."""
    part = record.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"config.json has {at}.{name}={short_repr(part)}; it must be an object")
    fields = {f"{at}.{name}.{field}": value for field, value in part.items()}
    computed = {f"{at}.{name}.{field}" for field in (size, "no_op", "replace_with_linear")}
    for field, value in fields.items():
        if value and field not in computed:
            require(fields, **{field: (None, False)})
    return fields


def _replacement(part: Mapping[str, Any], at: str) -> Literal["linear"] | None:
    """`LINEAR` where a product replaces the block."""
    return LINEAR if flag(part, f"{at}.replace_with_linear") and not flag(part, f"{at}.no_op") else None


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    rows = [*table_rows.vocabulary(config), *table_rows.norm("norm", "model.norm")]
    for index, block in enumerate(config.blocks):
        own = {"kv_heads": f"/{block.group}", "group": f"/{block.group}", "mlp": f"/{block.mlp}"}
        rows += table_rows.of_layer([*_attention(block), *_feed_forward(block)], index, block.stored, own)
    return tuple(rows)


def _attention(block: Block) -> list[Weight]:
    """The rows of attention or what is in its place, and of the norm before it."""
    if block.group is None:
        return []
    linear = [_linear("layers.{i}.attn_linear", f"{ATTENTION}.linear_attn")]
    norm = table_rows.norm("layers.{i}.attn_norm", f"{LAYER}.input_layernorm")
    return norm + (linear if block.group == LINEAR else table_rows.attention())


def _feed_forward(block: Block) -> list[Weight]:
    """The rows of the feed-forward block or what is in its place, and of the norm before it."""
    if block.mlp is None:
        return []
    linear = [_linear("layers.{i}.mlp_linear", f"{MLP}.linear_mlp")]
    norm = table_rows.norm("layers.{i}.mlp_norm", f"{LAYER}.post_attention_layernorm")
    return norm + (linear if block.mlp == LINEAR else table_rows.gated_mlp())


def _linear(path: str, module: str) -> Weight:
    """A product from the residual stream to the residual stream."""
    return Weight(path, "stream embed", (Stored(f"{module}.weight", "stream embed"),))


def cache_spec(config: Config) -> tuple[CacheGroup, ...]:
    """A group for the layers of each number of key-value heads; layers without attention are in none."""
    heads = config.kv_heads * config.group
    found: dict[int, list[int]] = {}
    for index, block in enumerate(config.blocks):
        if isinstance(block.group, int):
            found.setdefault(block.group, []).append(index)
    return tuple(
        CacheGroup(tuple(indices), KeysAndValues(heads // group, config.head_dim, f"kv_heads/{group}"))
        for group, indices in sorted(found.items())
    )


def same_layer(config: Config, index: int) -> int:
    """The first layer that computes what layer `index` computes: one that has the same."""
    return decoder.first_alike(index, ((block.group, block.mlp) for block in config.blocks))


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and its cache, if it has one, with this batch's tokens."""
    block = config.blocks[index]
    if block.group is not None:
        residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
        if block.group == LINEAR:
            residual = layers.add(residual, layers.linear(normed, p["attn_linear"], batch, "embed"))
        else:
            qkv = layers.linear(normed, p["qkv"], batch, "embed")
            rotation = batch.rotations[0]
            attended, cache = layers.attention(qkv, batch, cache, rotation=rotation, scale=config.head_dim**-0.5)
            residual = layers.add_linear(residual, attended, p["o"], batch, *HEADS)
    if block.mlp is not None:
        with jax.named_scope("mlp"):
            residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
            if block.mlp == LINEAR:
                residual = layers.add(residual, layers.linear(normed, p["mlp_linear"], batch, "embed"))
            else:
                hidden = layers.gated(normed, p["gate_up"], batch)
                residual = layers.add_linear(residual, hidden, p["down"], batch, "mlp")
    return residual, cache


ropes = decoder.ropes
embed = decoder.embed
last_rows = decoder.last_rows
head = decoder.head
