"""Gemma 4's E2B, E4B and 31B, the text part of multimodal checkpoints included."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints.error_text import short_repr
from checkpoints.table import Stored, Weight
from pallas_kernels.attention import Rotation, rotate, rotate_queries_and_keys
from pallas_kernels.matmul import ACTIVATIONS
from pallas_kernels.norm import Norm
from trtllm_jax.nn import decoder, layers, table_rows
from trtllm_jax.nn.batch import Batch, Cache
from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
from trtllm_jax.nn.config_fields import MAX_HEAD_DIM, above_zero, count, flag, positive, require, text_config
from trtllm_jax.nn.decoder import FULL, SLIDING, DecoderConfig, decoder_fields, layer_windows
from trtllm_jax.nn.execution import Execution
from trtllm_jax.nn.layers import Normed, Residual
from trtllm_jax.nn.rope import Rope, of_layer_type
from trtllm_jax.nn.table_rows import HEADS

ARCHITECTURES = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")

IGNORED = (
    "model.vision_tower.*", "model.embed_vision.*", "model.audio_tower.*", "model.embed_audio.*",
    "*.self_attn.k_proj.*", "*.self_attn.v_proj.*", "*.self_attn.k_norm.*",
)  # fmt: skip
"""Tensors of what sees and hears, and of layers that share the keys and values of another."""

DEFAULTS = {
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "sliding_window": 512, "vocab_size_per_layer_input": 262144,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}  # fmt: skip
"""What fields that are absent mean."""

OF_FULL = "/full"
"""What names the axes of the layers that see everything, which have other heads."""

EVERYTHING, WINDOW = 0, 1
"""The two kinds of layers: those that see everything, and those with a window."""


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The facts of one Gemma 4 model that its layers need; its heads are those of layers with a window.

    Attributes:
        prefix: what the names of its tensors start with.
        full_kv_heads: key-value heads of the layers that see everything.
        full_head_dim: channels of a head in these layers.
        keys_are_values: whether the values of these layers are their keys, before norm and rope.
        owners: for each layer the one whose keys and values it attends to: itself, or an earlier one of its kind.
        wide: whether the feed-forward blocks of layers that share keys and values have twice the hidden channels.
        per_layer: channels of what every layer has of each token beside the stream; 0 for none.
        rope: of the layers that see everything.
        local_rope: of those with a window.
        attention_bias: whether attention's projections have biases.
        logit_cap: logits become logit_cap * tanh(logit / logit_cap); None for as they are.
    """

    prefix: str
    full_kv_heads: int
    full_head_dim: int
    keys_are_values: bool
    owners: tuple[int, ...]
    wide: bool
    per_layer: int
    rope: Rope
    local_rope: Rope
    attention_bias: bool
    logit_cap: float | None

    @property
    def sizes(self) -> dict[str, int]:
        """The extent of every logical axis that the table names."""
        heads = {
            "kv_heads": self.full_kv_heads,
            "group": self.kv_heads * self.group // self.full_kv_heads,
            "head_dim": self.full_head_dim,
        }
        of_full = {f"{axis}{OF_FULL}": size for axis, size in heads.items()}
        return super().sizes | of_full | {"wide": 2, "per_layer": self.per_layer, "one": 1}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read a Hugging Face config.json; ValueError names a field that is missing or makes no sense."""
        nested = "text_config" in config
        stated = text_config(config) if nested else config
        config = DEFAULTS | {field: value for field, value in stated.items() if value is not None}
        require(
            config,
            hidden_activation=("gelu_pytorch_tanh",),
            enable_moe_block=(False,),
            use_bidirectional_attention=(None, "vision"),  # between tokens of a picture, which are not computed
            rope_scaling=(None,),
        )
        fields = decoder_fields({**config, "rope_parameters": None}, tied=True)
        positive(config, "sliding_window")  # which layers with a window must have
        windows = layer_windows(config, fields["num_layers"], lambda index: (index + 1) % 6 != 0)
        windows = (*windows[:-1], None)  # the last layer sees everything, whatever is stated of it
        per_layer = count(config, "hidden_size_per_layer_input", default=256)
        if per_layer:
            require(config, vocab_size_per_layer_input=(fields["vocab"],))
        keys_are_values = flag(config, "attention_k_eq_v")
        full_kv_heads, full_head_dim = _full_heads(config, windows)
        full = of_layer_type(config, FULL, ("rope_theta", 1e6))
        local = of_layer_type(config, SLIDING, ("rope_theta", 1e4))
        return cls(
            **fields | {"windows": windows},
            prefix="model.language_model" if nested else "model",
            full_kv_heads=full_kv_heads,
            full_head_dim=full_head_dim,
            keys_are_values=keys_are_values,
            owners=_owners(config, windows),
            wide=flag(config, "use_double_wide_mlp"),
            per_layer=per_layer,
            rope=Rope.from_config(full, full_head_dim),
            local_rope=Rope.from_config(local, fields["head_dim"]),
            attention_bias=flag(config, "attention_bias"),
            logit_cap=above_zero(config, "final_logit_softcapping"),
        )

    def kind(self, index: int) -> int:
        """Whether layer `index` sees everything or has a window."""
        return EVERYTHING if self.windows[index] is None else WINDOW

    def shares(self, index: int) -> bool:
        """Whether layer `index` attends to the keys and values of another one."""
        return self.owners[index] != index

    def has_keys_for_values(self, index: int) -> bool:
        """Whether the values of layer `index` are its keys."""
        return self.keys_are_values and self.kind(index) == EVERYTHING

    def lends(self, index: int) -> bool:
        """Whether other layers attend to the keys and values of layer `index`."""
        return self.owners.count(index) > 1


def _full_heads(config: Mapping[str, Any], windows: tuple[int | None, ...]) -> tuple[int, int]:
    """The key-value heads of the layers that see everything and their channels; newer files say it layer by layer."""
    heads, kv_heads = positive(config, "num_attention_heads"), positive(config, "num_key_value_heads")
    stated = config.get("per_layer_config")
    if stated is None:
        field, of_full = "num_global_key_value_heads", config
        found = positive(config, field, default=kv_heads) if flag(config, "attention_k_eq_v") else kv_heads
        head_dim = positive(config, "global_head_dim", default=512, most=MAX_HEAD_DIM)
    else:
        field, of_full = "num_key_value_heads", _of_full_layers(config, windows)
        found = positive(of_full, field, default=kv_heads)
        head_dim = positive(of_full, "head_dim", most=MAX_HEAD_DIM)
    if heads % found:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of {field}={found}, which the layers that see everything "
            "have"
        )
    return found, head_dim


def _of_full_layers(config: Mapping[str, Any], windows: tuple[int | None, ...]) -> dict[str, Any]:
    """The record in `per_layer_config` that all layers that see everything have."""
    stated = config["per_layer_config"]
    full = [str(index) for index, window in enumerate(windows) if window is None]
    stated = stated if isinstance(stated, dict) else {}
    of_layers = {str(index).lstrip("0") or "0": record for index, record in stated.items()}  # "05" of ten and more
    records = [of_layers.get(index) for index in full]
    first = records[0] if isinstance(records[0], dict) else {}
    known = {"head_dim"} <= first.keys() <= {"head_dim", "num_key_value_heads"}
    if of_layers.keys() != set(full) or any(record != first for record in records) or not known:
        raise ValueError(
            f"config.json has per_layer_config={short_repr(config['per_layer_config'])}; supported here: one head_dim "
            f"and one num_key_value_heads of all layers that see everything ({', '.join(full)}), and nothing else"
        )
    return first


def _owners(config: Mapping[str, Any], windows: tuple[int | None, ...]) -> tuple[int, ...]:
    """For each layer the one whose keys and values it attends to: of those that share, the last owner of their kind."""
    shared = count(config, "num_kv_shared_layers", default=0, most=len(windows) - 1)
    own = windows[: len(windows) - shared]
    if set(own) != set(windows):
        raise ValueError(
            f"config.json has num_kv_shared_layers={shared}, which leaves no layer with keys and values for some of "
            f"layer_types={short_repr(config.get('layer_types'))}"
        )
    last = {window: index for index, window in enumerate(own)}
    return (*range(len(own)), *(last[window] for window in windows[len(own) :]))


def table(config: Config) -> tuple[Weight, ...]:
    """Every weight: our path and axes, and where a Hugging Face checkpoint stores it."""
    model, layer = config.prefix, f"{config.prefix}.layers.{{i}}"
    rows = [
        *table_rows.vocabulary(config, f"{model}.embed_tokens"),
        *table_rows.norm("norm", f"{model}.norm"),
        *table_rows.norm("layers.{i}.attn_norm", f"{layer}.input_layernorm"),
        *table_rows.norm("layers.{i}.post_attn_norm", f"{layer}.post_attention_layernorm"),
        *table_rows.norm("layers.{i}.mlp_norm", f"{layer}.pre_feedforward_layernorm"),
        *table_rows.norm("layers.{i}.post_mlp_norm", f"{layer}.post_feedforward_layernorm"),
        Weight("layers.{i}.scale", "one", (Stored(f"{layer}.layer_scalar", "one"),)),
    ]
    if config.per_layer:
        rows += _per_layer_inputs(model, layer)
    for index in range(config.num_layers):
        rows += [*_attention(config, index), *_gated_mlp(config, index)]
    return tuple(rows)


def _per_layer_inputs(model: str, layer: str) -> list[Weight]:
    """What makes the inputs of all layers, and what each of them does with its own."""

    def row(path: str, module: str, axes: str, layout: str) -> Weight:
        return Weight(path, axes, (Stored(f"{module}.weight", layout),))

    inputs, gate, out = "layers per_layer", "per_layer embed", "embed per_layer"
    return [
        row("inputs_embed", f"{model}.embed_tokens_per_layer", f"vocab {inputs}", f"vocab ({inputs})"),
        row("inputs_projection", f"{model}.per_layer_model_projection", f"{inputs} embed", f"({inputs}) embed"),
        *table_rows.norm("inputs_norm", f"{model}.per_layer_projection_norm", axis="per_layer"),
        row("layers.{i}.input_gate", f"{layer}.per_layer_input_gate", gate, gate),
        row("layers.{i}.input_out", f"{layer}.per_layer_projection", out, out),
        *table_rows.norm("layers.{i}.post_input_norm", f"{layer}.post_per_layer_input_norm"),
    ]


def _attention(config: Config, index: int) -> list[Weight]:
    """`qkv` and `o` with their biases, and the norms of heads.

    Where keys and values are shared, `qkv` is q alone; where values are keys, q and k.
    """
    at, module = f"layers.{index}", f"{config.prefix}.layers.{index}.self_attn"
    own = OF_FULL if config.kind(index) == EVERYTHING else ""
    kv_heads, group, channels = (f"{axis}{own}" for axis in HEADS)
    heads, outputs = f"({kv_heads} qkv {channels})", f"{kv_heads} {group} {channels}"
    sizes: dict[str, str | int] = {"q_proj": group}
    if not config.shares(index):
        sizes |= {"k_proj": 1} if config.has_keys_for_values(index) else {"k_proj": 1, "v_proj": 1}

    def qkv(suffix: str, layout: str) -> tuple[Stored, ...]:
        return tuple(Stored(f"{module}.{name}.{suffix}", layout, size) for name, size in sizes.items())

    stored = (Stored(f"{module}.o_proj.weight", f"embed ({outputs})"),)
    rows = [
        Weight(f"{at}.qkv", f"{kv_heads} qkv {channels} embed", qkv("weight", f"{heads} embed"), fuse="qkv"),
        Weight(f"{at}.o", f"embed {outputs}", stored),
        *table_rows.norm(f"{at}.q_norm", f"{module}.q_norm", axis=channels),
    ]
    if not config.shares(index):
        rows += table_rows.norm(f"{at}.k_norm", f"{module}.k_norm", axis=channels)
    if config.attention_bias:
        rows.append(Weight(f"{at}.qkv_bias", f"{kv_heads} qkv {channels}", qkv("bias", heads), fuse="qkv"))
        rows.append(Weight(f"{at}.o_bias", "embed", (Stored(f"{module}.o_proj.bias", "embed"),)))
    return rows


def _gated_mlp(config: Config, index: int) -> list[Weight]:
    """`gate_up` and `down`; a block of twice the hidden channels has an axis more."""
    at, module = f"layers.{index}", f"{config.prefix}.layers.{index}.mlp"
    hidden = "wide mlp" if config.wide and config.shares(index) else "mlp"
    gate_up = tuple(Stored(f"{module}.{name}.weight", f"({hidden}) embed", 1) for name in ("gate_proj", "up_proj"))
    return [
        Weight(f"{at}.gate_up", f"two {hidden} embed", gate_up, fuse="two"),
        Weight(f"{at}.down", f"embed {hidden}", (Stored(f"{module}.down_proj.weight", f"embed ({hidden})"),)),
    ]


def cache_spec(config: Config) -> tuple[CacheGroup, ...]:
    """A group for each kind of layers, without those that share another's keys and values."""
    groups = []
    full = KeysAndValues(config.full_kv_heads, config.full_head_dim, f"kv_heads{OF_FULL}")
    for kind, kept in ((EVERYTHING, full), (WINDOW, config.keys_and_values)):
        owners = [index for index in sorted(set(config.owners)) if config.kind(index) == kind]
        if owners:
            groups.append(CacheGroup(tuple(owners), kept, config.reaches[owners[0]]))
    return tuple(groups)


def cache_of(config: Config, index: int) -> int:
    """The layer whose cache layer `index` attends to."""
    return config.owners[index]


def same_layer(config: Config, index: int) -> int:
    """The first layer that computes what layer `index` computes: one of the same kind that shares and lends alike."""
    return decoder.first_alike(
        index, *(map(fact, range(config.num_layers)) for fact in (config.kind, config.shares, config.lends))
    )


def ropes(config: Config) -> tuple[Rope, ...]:
    """The ropes whose rotations the layers find in the batch: of each kind of layers."""
    return (config.rope, config.local_rope)


class Carried(NamedTuple):
    """What layers are given beside the residual stream.

    Attributes:
        inputs: what each layer has of each token, that of the next layer first; None for nothing. They are rolled
            instead of indexed, because equal layers are compiled once; XLA makes one slice a layer of it.
        lent: for each kind of layers the new tokens' keys, rotated, and values, which layers that share them attend to;
            None before the layer that lends them.
    """

    inputs: Float[Array, "t layers per_layer"] | None
    lent: tuple[Float[Array, "t h 2 d"] | None, Float[Array, "t h 2 d"] | None] = (None, None)


def embed(config: Config, params: Any, batch: Batch) -> Residual:
    """The residual stream [t, embed] that enters the first layer, and what all layers have of the tokens beside it."""
    x = layers.embed(batch, params["embed"], scale=config.embed**0.5).x
    return Residual(x, carried=Carried(_inputs(config, params, batch, x) if config.per_layer else None))


def _inputs(config: Config, params: Any, batch: Batch, x: jax.Array) -> jax.Array:
    """For each layer the mean of a token's own embedding and of a projection of the stream, times the root of two."""
    own = params["inputs_embed"]
    own = layers.embed(replace(batch, embeddings=None), own.reshape(len(own), -1), scale=config.per_layer**0.5).x
    projected = layers.linear(x, params["inputs_projection"], batch, "embed") * config.embed**-0.5
    projected = layers.norm(projected, config.norm(params, "inputs_norm"), batch)
    return (projected + own.reshape(projected.shape)) * 2**-0.5


def layer(config: Config, index: int, p: Any, residual: Residual, batch: Batch, cache: Cache) -> tuple[Residual, Cache]:
    """The residual stream after layer `index`, and the cache that it attends to with this batch's tokens."""
    residual, normed = layers.normalised(residual, config.norm(p, "attn_norm"), batch)
    lent = residual.carried.lent
    qkv, rotation = _heads(config, index, p, normed, batch, lent)
    if config.lends(index):
        lent = tuple(qkv[:, :, -2:] if kind == config.kind(index) else of_kind for kind, of_kind in enumerate(lent))
    attended, cache = layers.attention(qkv, batch, cache, rotation=rotation, scale=1.0, window=config.windows[index])
    rows = layers.linear(attended, p["o"], batch, *HEADS, bias=p.get("o_bias"))
    residual = layers.add(residual, rows, config.norm(p, "post_attn_norm"))
    with jax.named_scope("mlp"):
        residual, normed = layers.normalised(residual, config.norm(p, "mlp_norm"), batch)
        hidden = layers.gated(normed, p["gate_up"].reshape(2, -1, config.embed), batch, activation="gelu_tanh")
        rows = layers.linear(hidden, p["down"].reshape(config.embed, -1), batch, "mlp")
        residual = layers.add(residual, layers.norm(rows, config.norm(p, "post_mlp_norm"), batch))
    inputs = residual.carried.inputs
    if inputs is not None:
        gate = ACTIVATIONS["gelu_tanh"](layers.linear(residual.total, p["input_gate"], batch, "embed"))
        rows = layers.linear(gate * inputs[:, 0], p["input_out"], batch, "per_layer")
        residual = layers.add(residual, layers.norm(rows, config.norm(p, "post_input_norm"), batch))
        inputs = jnp.roll(inputs, -1, axis=1)
    scaled = residual.total * p["scale"].astype(residual.x.dtype)
    return Residual(scaled, carried=Carried(inputs, lent)), cache


def _heads(
    config: Config, index: int, p: Any, normed: Normed, batch: Batch, lent: tuple[jax.Array | None, ...]
) -> tuple[Float[Array, "t h qkv d"], Rotation | None]:
    """A layer's queries with its own keys and values or those that it shares, and the rotation that they still need."""
    kind = config.kind(index)
    rotation, shared = batch.rotations[kind], lent[kind]
    qkv = layers.linear(normed, p["qkv"], batch, "embed", bias=p.get("qkv_bias"))
    if config.shares(index) and shared is not None:
        queries = rotate(layers.norm(qkv, config.norm(p, "q_norm"), batch), rotation)
        return jnp.concatenate([queries, shared], axis=2), None
    if config.has_keys_for_values(index):
        qkv = jnp.concatenate([qkv, qkv[:, :, -1:]], axis=2)
    qkv = layers.normalised_heads(qkv, config.head_norms(p), batch)
    plain = Norm(jnp.ones(qkv.shape[-1], qkv.dtype), config.eps)
    qkv = jnp.concatenate([qkv[:, :, :-1], layers.norm(qkv[:, :, -1:], plain, batch)], axis=2)
    # Keys are lent as they are in the cache, so that who shares them writes there what is there already.
    return (rotate_queries_and_keys(qkv, rotation), None) if config.lends(index) else (qkv, rotation)


def head(config: Config, params: Any, x: jax.Array, execution: Execution) -> jax.Array:
    """Logits [n, vocab] of rows of the residual stream after the last layer."""
    return decoder.head(config, params, x, execution, soft_cap=config.logit_cap)


last_rows = decoder.last_rows
