"""The rows of a table of weights that decoder-only architectures share, by the names of Hugging Face's Llama.

An architecture's `table` puts rows from here together with its own. A module's name is an argument where others differ.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from checkpoints.table import Stored, Weight
from trtllm_jax.nn.decoder import DecoderConfig

LAYER = "model.layers.{i}"
ATTENTION = f"{LAYER}.self_attn"
MLP = f"{LAYER}.mlp"

HEADS = ("kv_heads", "group", "head_dim")
"""The axes of attention's result, which the output projection contracts."""

PAIRED_HEADS = ("kv_heads", "group", "part", "half", "pair")
"""The same of models whose rope rotates neighbouring channels: the axes of `attention(paired=True)`'s `o`."""


def vocabulary(
    config: DecoderConfig,
    embedding: str = "model.embed_tokens",
    head: str = "lm_head",
    *,
    bias: bool = False,
    channels: str = "embed",
) -> list[Weight]:
    """`embed`, and `head` where the logits are not computed with the embeddings, or are those of a classifier.

    With a bias there is `head_bias` too, but not of a classifier. Of a bare decoder there is `embed` alone. `channels`
    is the axis of an embedding.
    """
    vocab, labels = f"vocab {channels}", f"labels {channels}"
    weights = [Weight("embed", vocab, (Stored(f"{embedding}.weight", vocab),))]
    if config.bare:
        return weights
    if config.labels:
        weights.append(Weight("head", labels, (Stored("score.weight", labels),)))
    elif not config.tied:
        weights.append(Weight("head", vocab, (Stored(f"{head}.weight", vocab),)))
    if bias and not config.labels:
        weights.append(Weight("head_bias", "vocab", (Stored(f"{head}.bias", "vocab"),)))
    return weights


def norm(path: str, module: str, *, axis: str = "embed", bias: bool = False) -> list[Weight]:
    """The weight of a norm at `path`, and its bias at `{path}_bias`."""
    weights = [Weight(path, axis, (Stored(f"{module}.weight", axis),))]
    if bias:
        weights.append(Weight(f"{path}_bias", axis, (Stored(f"{module}.bias", axis),)))
    return weights


def attention(
    *,
    bias: bool = False,
    output_bias: bool = False,
    module: str = ATTENTION,
    names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
    output: str = "o_proj",
    paired: bool = False,
) -> list[Weight]:
    """`qkv`, which fuses three projections, and `o`, with their biases; `names` are those of the three.

    With `paired`, rope rotates channels that are stored next to each other. Ours are in two halves as those of other
    models, along the axes `part half pair` instead of `head_dim`; reshape the product to one axis of channels. Where
    rope rotates the first channels of a head only, these are a `part`, and the others parts of as many: `paired_sizes`.
    """
    channels, stored_channels = ("part half pair", "part pair half") if paired else ("head_dim", "head_dim")
    heads = f"(kv_heads qkv {stored_channels})"

    def qkv(suffix: str, layout: str) -> tuple[Stored, ...]:
        sizes: tuple[str | int, ...] = ("group", 1, 1)
        parts = zip(names, sizes, strict=True)
        return tuple(Stored(f"{module}.{name}.{suffix}", layout, size) for name, size in parts)

    stored = (Stored(f"{module}.{output}.weight", f"embed (kv_heads group {stored_channels})"),)
    weights = [
        Weight("layers.{i}.qkv", f"kv_heads qkv {channels} embed", qkv("weight", f"{heads} embed"), fuse="qkv"),
        Weight("layers.{i}.o", f"embed kv_heads group {channels}", stored),
    ]
    if bias:
        weights.append(Weight("layers.{i}.qkv_bias", f"kv_heads qkv {channels}", qkv("bias", heads), fuse="qkv"))
    if output_bias:
        weights.append(Weight("layers.{i}.o_bias", "embed", (Stored(f"{module}.{output}.bias", "embed"),)))
    return weights


def fused_attention(
    config: DecoderConfig, fused: str, output: str, *, bias: bool = False, stacked: bool = False
) -> list[Weight]:
    """`qkv` and `o`, with their biases, of a checkpoint whose module `fused` has the heads of group after group.

    With `stacked`, it has all queries, then all keys, then all values. Where devices outnumber the key-value heads of
    groups, these are repeated only if there is one.
    """
    in_parts = stacked or config.kv_heads == 1
    parts: tuple[str | int, ...] = ("group", 1, 1) if in_parts else (config.group + 2,)

    def qkv(suffix: str, layout: str) -> tuple[Stored, ...]:
        return tuple(Stored(f"{fused}.{suffix}", layout, size) for size in parts)

    heads, axes = "(kv_heads qkv head_dim)", "kv_heads group head_dim"
    stored = (Stored(f"{output}.weight", f"embed ({axes})"),)
    weights = [
        Weight("layers.{i}.qkv", "kv_heads qkv head_dim embed", qkv("weight", f"{heads} embed"), fuse="qkv"),
        Weight("layers.{i}.o", f"embed {axes}", stored),
    ]
    if bias:
        weights.append(Weight("layers.{i}.qkv_bias", "kv_heads qkv head_dim", qkv("bias", heads), fuse="qkv"))
        weights.append(Weight("layers.{i}.o_bias", "embed", (Stored(f"{output}.bias", "embed"),)))
    return weights


def paired_sizes(head_dim: int, rotary: int) -> dict[str, int]:
    """The sizes of the axes of channels in `attention(paired=True)` whose rope rotates the first `rotary` of a head."""
    if head_dim % rotary or rotary % 2:
        raise ValueError(
            f"rope rotates {rotary} of {head_dim} channels of a head in pairs of neighbours; supported here: an even "
            "number that divides all"
        )
    return {"part": head_dim // rotary, "half": 2, "pair": rotary // 2}


def head_norms(
    module: str = ATTENTION, *, names: tuple[str, str] = ("q_norm", "k_norm"), bias: bool = False
) -> list[Weight]:
    """The weights of the norms of every query head, `q_norm`, and of every key head, `k_norm`, and their biases."""
    paths = ("layers.{i}.q_norm", "layers.{i}.k_norm")
    of_each = (norm(at, f"{module}.{name}", axis="head_dim", bias=bias) for at, name in zip(paths, names, strict=True))
    return [row for rows in of_each for row in rows]


def gated_mlp(*, bias: bool = False, module: str = MLP) -> list[Weight]:
    """`gate_up`, which fuses two projections, and `down`, with their biases."""
    return _gated_mlp((f"{module}.gate_proj", f"{module}.up_proj"), f"{module}.down_proj", bias)


def stacked_mlp(
    gate_up: str = f"{MLP}.gate_up_proj", down: str = f"{MLP}.down_proj", *, bias: bool = False
) -> list[Weight]:
    """`gate_up` and `down` of a gated block whose checkpoint stacks the gate's weights on the others too."""
    return _gated_mlp((gate_up,), down, bias)


def _gated_mlp(gate_up: tuple[str, ...], down: str, bias: bool) -> list[Weight]:
    """The rows of a gated block, whose two projections are in as many modules or stacked in one."""

    def both(suffix: str, layout: str) -> tuple[Stored, ...]:
        return tuple(Stored(f"{module}.{suffix}", layout, 2 // len(gate_up)) for module in gate_up)

    weights = [
        Weight("layers.{i}.gate_up", "two mlp embed", both("weight", "(two mlp) embed"), fuse="two"),
        Weight("layers.{i}.down", "embed mlp", (Stored(f"{down}.weight", "embed mlp"),)),
    ]
    if bias:
        weights.append(Weight("layers.{i}.gate_up_bias", "two mlp", both("bias", "(two mlp)"), fuse="two"))
        weights.append(Weight("layers.{i}.down_bias", "embed", (Stored(f"{down}.bias", "embed"),)))
    return weights


def of_layer(rows: Iterable[Weight], index: int, stored: int, suffixes: Mapping[str, str]) -> list[Weight]:
    """The rows of layer `index`, which the checkpoint numbers `stored`, in a model whose layers differ in sizes.

    `suffixes` has what the names of axes with extents of its own end with: "/8" makes "kv_heads/8" of "kv_heads".
    """

    def named(axes: str) -> str:
        return re.sub(r"[^\s()]+", lambda axis: axis[0] + suffixes.get(axis[0], ""), axes)

    def own(tensor: Stored) -> Stored:
        size = named(tensor.size) if isinstance(tensor.size, str) else tensor.size
        return Stored(tensor.name.replace("{i}", str(stored)), named(tensor.layout), size)

    return [
        replace(
            row,
            path=row.path.replace("{i}", str(index)),
            axes=named(row.axes),
            stored=tuple(own(tensor) for tensor in row.stored),
        )
        for row in rows
    ]


def plain_mlp(up: str, down: str, *, bias: bool = False) -> list[Weight]:
    """`up` and `down` of a block without a gate, with their biases; the arguments are the modules' names."""
    weights = [
        Weight("layers.{i}.up", "mlp embed", (Stored(f"{up}.weight", "mlp embed"),)),
        Weight("layers.{i}.down", "embed mlp", (Stored(f"{down}.weight", "embed mlp"),)),
    ]
    if bias:
        weights.append(Weight("layers.{i}.up_bias", "mlp", (Stored(f"{up}.bias", "mlp"),)))
        weights.append(Weight("layers.{i}.down_bias", "embed", (Stored(f"{down}.bias", "embed"),)))
    return weights
