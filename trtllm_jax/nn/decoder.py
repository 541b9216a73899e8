"""What decoder-only architectures share beside layers and weights: sizes, cache groups, the first and the last step.

An architecture's `Config` adds what is its own to `DecoderConfig`. One that has nothing of its own to say in one of the
functions that every architecture must have takes the one from here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from checkpoints.error_text import short_repr
from pallas_kernels.attention import HeadNorms
from pallas_kernels.matmul import Activation
from pallas_kernels.norm import Norm
from trtllm_jax.common.numbers import INT32_MAX
from trtllm_jax.nn import layers
from trtllm_jax.nn.batch import Batch
from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
from trtllm_jax.nn.config_fields import MAX_HEAD_DIM, MAX_LAYERS, count, flag, number, positive, require
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.pooling import last_token
from trtllm_jax.nn.reach import Reach
from trtllm_jax.nn.rope import Rope, context_stretch

SLIDING, CHUNKED, FULL = "sliding_attention", "chunked_attention", "full_attention"
"""The kinds of layers that `layer_types` names."""

HF_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}
"""The activations by the names that Hugging Face configurations have for them."""

GPT2_NAMES: Mapping[str, str] = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""What configurations in the style of GPT-2 call the sizes that others give the names on the left."""


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder-only model.

    Attributes:
        vocab: entries of the vocabulary.
        embed: channels of the residual stream.
        mlp: hidden channels of the feed-forward block.
        num_layers: layers.
        kv_heads: key-value heads.
        group: query heads of a key-value head.
        head_dim: channels of a head.
        eps: what norms add to the mean square or the variance.
        tied: whether the logits are computed with the embeddings.
        max_position: tokens of the longest sequence.
        windows: for each layer the number of tokens that a token sees, itself included; None for all.
        labels: classes of a sequence classifier; 0 for other models.
        bare: whether the checkpoint has no head, and the model hidden states alone.
    """

    vocab: int
    embed: int
    mlp: int
    num_layers: int
    kv_heads: int
    group: int
    head_dim: int
    eps: float
    tied: bool
    max_position: int
    windows: tuple[int | None, ...]
    labels: int = field(default=0, kw_only=True)
    bare: bool = field(default=False, kw_only=True)

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        names = ("vocab", "embed", "mlp", "kv_heads", "group", "head_dim", *(("labels",) if self.labels else ()))
        channels = {"part": 1, "half": 2, "pair": self.head_dim // 2} if self.head_dim > 1 else {}
        return {name: getattr(self, name) for name in names} | channels | {"layers": self.num_layers}

    @property
    def keys_and_values(self) -> KeysAndValues:
        """What a layer keeps of each token."""
        return KeysAndValues(self.kv_heads, self.head_dim)

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """Which tokens a token of each layer reads."""
        return tuple(map(Reach, self.windows))

    def norm(self, params: Any, name: str) -> Norm:
        """The norm whose weight a layer's parameters, or the model's, have under this name."""
        return Norm(params[name], self.eps)

    def head_norms(self, params: Any) -> HeadNorms:
        """The norms of a layer's query heads and of its key heads."""
        return HeadNorms(self.norm(params, "q_norm"), self.norm(params, "k_norm"))


@dataclass(frozen=True)
class LayerNormConfig(DecoderConfig):
    """The sizes of a decoder-only model with layer norms (Ba et al. 2016, arXiv:1607.06450)."""

    def norm(self, params: Any, name: str) -> Norm:
        """The layer norm whose weight, and bias if it has one, are under this name."""
        return Norm(params[name], self.eps, bias=params.get(f"{name}_bias"), kind="layer")


@dataclass(frozen=True)
class OffsetNormConfig(DecoderConfig):
    """The sizes of a decoder-only model whose norms' weights are stored less one, as Gemma's are."""

    def norm(self, params: Any, name: str) -> Norm:
        """The norm of this name."""
        return Norm(params[name], self.eps, offset=1.0)


def decoder_fields(config: Mapping[str, Any], *, eps: str = "rms_norm_eps", tied: bool = False) -> dict[str, Any]:
    """The fields of `DecoderConfig` as most Hugging Face configurations spell them.

    `eps` names the field of the norms' epsilon, `tied` is what an absent `tie_word_embeddings` means. No layer has a
    window. ValueError names a field that is missing or makes no sense.
    """
    heads = positive(config, "num_attention_heads")
    kv_heads = positive(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    embed = positive(config, "hidden_size")
    positions = positive(config, "max_position_embeddings", default=2048)
    num_layers = positive(config, "num_hidden_layers", most=MAX_LAYERS)
    return {
        "vocab": positive(config, "vocab_size"),
        "embed": embed,
        "mlp": positive(config, "intermediate_size"),
        "num_layers": num_layers,
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "head_dim": positive(config, "head_dim", default=embed // heads, most=MAX_HEAD_DIM),
        "eps": number(config, eps, default=1e-6),
        "tied": tied if config.get("tie_word_embeddings") is None else flag(config, "tie_word_embeddings"),
        "max_position": min(INT32_MAX, int(positions * context_stretch(config))),
        "windows": (None,) * num_layers,
        "labels": num_labels(config),
    }


def gpt2_fields(config: Mapping[str, Any], *, kv_heads: int | None = None) -> dict[str, Any]:
    """The fields of `DecoderConfig` as configurations in the style of GPT-2 spell them.

    `kv_heads` are the key-value heads, None for as many as there are query heads. ValueError names a field that is
    missing or makes no sense.
    """
    stated = {"n_positions": 1024, "layer_norm_epsilon": 1e-5, **config}
    stated["n_inner"] = positive(config, "n_inner", default=4 * positive(config, "n_embd"))
    sizes = {ours: positive(stated, theirs) for ours, theirs in GPT2_NAMES.items()}
    require_whole_heads(stated, "n_embd", "n_head")
    of_heads = {"num_key_value_heads": kv_heads, "head_dim": None}
    return decoder_fields({**stated, **sizes, **of_heads}, eps="layer_norm_epsilon", tied=True)


def num_labels(config: Mapping[str, Any]) -> int:
    """The classes of a sequence classifier, by its architecture's name; 0 for other models."""
    stated = config.get("architectures") or ()
    named = [stated] if isinstance(stated, str) else stated
    if not any(str(name).endswith("ForSequenceClassification") for name in named):
        return 0
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and labels:
        return len(labels)
    return positive(config, "num_labels", default=2)


def activation(config: Mapping[str, Any], default: str, *, field: str = "hidden_act") -> Activation:
    """The function that `field` names, `default` where it is absent; ValueError lists those that are known."""
    require(config, **{field: (default, *(name for name in HF_ACTIVATIONS if name != default))})
    return HF_ACTIVATIONS[config.get(field, default)]


def require_whole_heads(
    config: Mapping[str, Any], embed: str = "hidden_size", heads: str = "num_attention_heads"
) -> None:
    """Raise ValueError if heads do not share the channels of the residual stream; the fields are named."""
    if config[embed] % config[heads]:
        raise ValueError(f"{embed}={config[embed]} is not a multiple of {heads}={config[heads]}")


def layer_windows(
    config: Mapping[str, Any], num_layers: int, is_windowed: Callable[[int], bool] = lambda index: True
) -> tuple[int | None, ...]:
    """The window of each layer, None for one that sees everything: `sliding_window` where `layer_types` say so.

    `is_windowed` says it of configurations without `layer_types`, as older ones are.
    """
    is_sliding = _layers_of(config, SLIDING, num_layers, is_windowed)
    if not any(is_sliding) or config.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive(config, "sliding_window")
    return tuple(window if one else None for one in is_sliding)


def layer_chunks(
    config: Mapping[str, Any], num_layers: int, is_chunked: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """How many tokens the chunks of each layer have, None for one that sees everything: `attention_chunk_size`.

    `is_chunked` says which layers have chunks where no `layer_types` do. ValueError names a field that makes no sense.
    """
    is_limited = _layers_of(config, CHUNKED, num_layers, is_chunked)
    chunk = positive(config, "attention_chunk_size") if any(is_limited) else None
    return tuple(chunk if one else None for one in is_limited)


def _layers_of(
    config: Mapping[str, Any], kind: str, num_layers: int, is_of_kind: Callable[[int], bool]
) -> tuple[bool, ...]:
    """Whether each layer is of a kind, as `layer_types` say, or `is_of_kind` where there are none."""
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(map(is_of_kind, range(num_layers)))
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(map(str, kinds)) <= {kind, FULL}:
        raise ValueError(
            f"config.json has layer_types={short_repr(kinds)}; it must be a list of num_hidden_layers={num_layers} "
            f"names, {kind!r} or {FULL!r}"
        )
    return tuple(one == kind for one in kinds)


def rotated_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Whether each layer rotates its heads: `no_rope_layers` says 1 of those that do.

    Where it is absent, every layer does but each `no_rope_layer_interval`-th, by default each fourth
    (Yang et al. 2025, arXiv:2501.18795).
    """
    stated = config.get("no_rope_layers")
    if stated is None:
        interval = positive(config, "no_rope_layer_interval", default=4)
        return tuple((index + 1) % interval != 0 for index in range(num_layers))
    if not isinstance(stated, list) or len(stated) != num_layers or not all(one in (0, 1) for one in stated):
        raise ValueError(
            f"config.json has no_rope_layers={short_repr(stated)}; it must be a list of num_hidden_layers={num_layers} "
            "numbers, 0 or 1"
        )
    return tuple(map(bool, stated))


def switched_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """`layer_windows` as Qwen's configurations state them: none at all unless `use_sliding_window`.

    Without `layer_types` the first `max_window_layers` layers have none.
    """
    if not flag(config, "use_sliding_window"):
        if SLIDING in (config.get("layer_types") or ()):
            raise ValueError(f"config.json has layer_types with {SLIDING!r}, but use_sliding_window=False")
        return layer_windows({**config, "sliding_window": None}, num_layers)
    first = count(config, "max_window_layers", default=28)
    return layer_windows(config, num_layers, lambda index: index >= first)


def cache_spec(config: DecoderConfig) -> tuple[CacheGroup, ...]:
    """A group for the layers of each reach, those that see everything first."""
    reaches = config.reaches
    ordered = sorted(set(reaches), key=lambda reach: (reach.most is not None, reach.most or 0))
    of_reach = {reach: [index for index, one in enumerate(reaches) if one == reach] for reach in ordered}
    return tuple(CacheGroup(tuple(found), config.keys_and_values, reach) for reach, found in of_reach.items())


def no_cache(config: DecoderConfig) -> tuple[CacheGroup, ...]:
    """The `cache_spec` of an encoder: every token sees those after it, so a text is computed whole."""
    return ()


def same_layer(config: DecoderConfig, index: int) -> int:
    """The first layer that computes what layer `index` computes: one that sees as far."""
    return first_alike(index, config.reaches)


def first_alike(index: int, *facts: Iterable[Any]) -> int:
    """The first layer of which every fact, each of which has one entry a layer, is that of layer `index`."""
    alike = list(zip(*facts, strict=True))
    return alike.index(alike[index])


class _HasRope(Protocol):
    @property
    def rope(self) -> Rope: ...


def ropes(config: _HasRope) -> tuple[Rope, ...]:
    """The ropes whose rotations the layers find in the batch: one."""
    return (config.rope,)


def no_ropes(config: DecoderConfig) -> tuple[Rope, ...]:
    """The `ropes` of an architecture whose positions have embeddings, or bias the scores."""
    return ()


def embed(config: DecoderConfig, params: Any, batch: Batch) -> layers.Residual:
    """The residual stream [t, embed] that enters the first layer: the tokens' embeddings."""
    return layers.embed(batch, params["embed"])


def last_rows(config: DecoderConfig, params: Any, x: jax.Array) -> layers.Normed:
    """What `head` reads of rows [n, embed] of the residual stream after the last layer."""
    return layers.Normed(x, config.norm(params, "norm"))


def head(
    config: DecoderConfig, params: Any, x: jax.Array, execution: Execution, *, soft_cap: float | None = None
) -> jax.Array:
    """Logits [n, vocab] of rows of the residual stream after the last layer, normalised first."""
    table, bias = params.get("head", params["embed"]), params.get("head_bias")
    return layers.logits(last_rows(config, params, x), table, config.vocab, execution, bias=bias, soft_cap=soft_cap)


def classify(config: DecoderConfig, params: Any, x: jax.Array, lengths: jax.Array, execution: Execution) -> jax.Array:
    """The logits [b, labels] of sequences with hidden states [b, s, embed]: of the last token of each."""
    return layers.projected(last_rows(config, params, last_token(x, lengths)), params["head"], execution)
