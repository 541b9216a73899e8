"""Rotary position embedding and its scaled variants (Su et al. 2021, arXiv:2104.09864)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from checkpoints.error_text import short_repr
from pallas_kernels.attention import Rotation

MOST = 1e30
"""The largest number accepted in a configuration; products and quotients of two such numbers fit in float64."""


@dataclass(frozen=True)
class GrowingBase:
    """Frequencies of sequences longer than `trained` (dynamic NTK): the base grows with the length."""

    trained: int
    base: float
    factor: float

    def frequencies(self, lengths: Int32[Array, " t"], pairs: int) -> Float32[Array, "t pairs"]:
        """Radians per position in sequences of these lengths."""
        dim = 2 * pairs
        length = jnp.maximum(lengths, self.trained)[:, None].astype(jnp.float32)
        grown = self.base * (self.factor * length / self.trained - (self.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / grown ** (jnp.arange(0, dim, 2) / dim)


@dataclass(frozen=True)
class LongFrequencies:
    """Frequencies of sequences longer than `trained` that do not depend on how much longer (LongRoPE).

    A key keeps the frequencies of the length at its time, as with every rope here. Transformers computes all keys again
    when a sequence grows beyond `trained` by generating.
    """

    trained: int
    values: tuple[float, ...]

    def frequencies(self, lengths: Int32[Array, " t"], pairs: int) -> Float32[Array, "1 pairs"]:
        """Radians per position, the same for all lengths."""
        return jnp.asarray(self.values, jnp.float32)[None]


@dataclass(frozen=True)
class Rope:
    """The rotation frequencies of an attention head, as a model's configuration gives them.

    Attributes:
        frequencies: radians per position for each of the head_dim / 2 pairs of channels.
        attention_factor: the factor on cosine and sine (YaRN's temperature; 1 for other types).
        longer: the frequencies of sequences longer than the trained length; None if they are the same.
    """

    frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    longer: GrowingBase | LongFrequencies | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int, theta: float = 10000.0) -> "Rope":
        """The rope of a Hugging Face configuration; ValueError names a field that is missing or not supported.

        `theta` is the default of `rope_theta`.
        """
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd; rotary embedding needs pairs of channels")
        scaling = scaling_of(config)
        base = _number(config if scaling.get("rope_theta") is None else scaling, "rope_theta", default=theta)
        kind = scaling["rope_type"]
        plain = 1.0 / base ** (np.arange(0, head_dim, 2) / head_dim)
        longest = int(_number(config, "max_position_embeddings", default=2048, least=1))
        original = "original_max_position_embeddings"
        trained = int(_number(config if config.get(original) else scaling, original, default=longest, least=1))
        if kind == "default":
            return cls(tuple(plain))
        if kind == "linear":
            return cls(tuple(plain / _number(scaling, "factor")))
        if kind == "dynamic":
            return _dynamic(plain, base, scaling, longest)
        if kind == "llama3":
            return cls(tuple(_llama3(plain, scaling, trained)))
        if kind == "yarn":
            return _yarn(plain, base, head_dim, scaling, trained)
        if kind == "longrope":
            return _longrope(plain, scaling, trained, longest)
        if kind == "proportional":
            return cls(tuple(_proportional(plain, scaling)))
        if kind == "frequency_factors":
            return cls(tuple(plain / _factors(scaling, len(plain))))
        raise ValueError(
            f"rope_scaling has rope_type {short_repr(kind)}, which is not supported; supported: default, linear, "
            "dynamic, llama3, yarn, longrope, proportional, frequency_factors"
        )


def rotary_channels(config: Mapping[str, Any], head_dim: int, part: float = 1.0) -> int:
    """How many channels of a head are rotated: `partial_rotary_factor` of them, where absent `part` of them."""
    scaling = scaling_of(config)
    field = "partial_rotary_factor"
    stated = scaling if scaling.get(field) is not None else config
    factor = _number(stated, field, default=part)
    channels = int(head_dim * factor)
    if not 2 <= channels <= head_dim:
        raise ValueError(
            f"config.json has partial_rotary_factor={factor:g}, which rotates {channels} of {head_dim} channels of a "
            "head; it must be at least 2 of them, and at most all"
        )
    return channels


def of_layer_type(
    config: Mapping[str, Any], layer_type: str, base: tuple[str, float], *, scaled: bool = True
) -> dict[str, Any]:
    """The configuration with the rope of the layers of one type, for `Rope.from_config`.

    `rope_parameters` has a record for each type. Files before transformers 5 have none: there `base` names the field of
    the base and its default. `rope_scaling` is for the layers that are `scaled`, and takes precedence there.
    """
    records = config.get("rope_parameters") or {}
    record = records.get(layer_type) or {} if isinstance(records, dict) else None
    if not isinstance(record, dict) or "rope_type" in records or "rope_theta" in records:
        raise ValueError(
            f"config.json has rope_parameters={short_repr(records)}; it must have an object for each type of layers, "
            f"such as {layer_type!r}"
        )
    scaling = config.get("rope_scaling") if scaled else None
    if scaling is not None and not isinstance(scaling, dict):
        raise ValueError(f"config.json has rope_scaling={short_repr(scaling)}; it must be an object")
    field, default = base
    stated = default if config.get(field) is None else config[field]
    used = scaling or record
    theta = next((one["rope_theta"] for one in (used, record) if one.get("rope_theta") is not None), stated)
    return {**config, "rope_scaling": None, "rope_parameters": {**used, "rope_theta": theta}}


def context_stretch(config: Mapping[str, Any]) -> float:
    """The factor by which a sequence may exceed max_position_embeddings.

    With linear and dynamic scaling that field states the length that was trained, with the other types the length after
    scaling. TensorRT-LLM infers max_seq_len by the same rule.
    """
    scaling = scaling_of(config)
    return _number(scaling, "factor") if scaling["rope_type"] in ("linear", "dynamic") else 1.0


def scaling_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's rope_scaling or rope_parameters, with `rope_type` always present.

    As in transformers, rope_scaling takes precedence: people add it to a configuration to extend a model's context.
    """
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(field) or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"config.json has {field}={short_repr(scaling)}; it must be an object")
    return {**scaling, "rope_type": scaling.get("rope_type") or scaling.get("type") or "default"}


def _number(record: Mapping[str, Any], field: str, *, default: float | None = None, least: float = 1e-30) -> float:
    """`record[field]` as a number from `least` to MOST; `default`, if there is one, for absent or null."""
    value = record.get(field)
    if default is not None and value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= MOST:
        of_type = (
            f"rope_scaling of rope_type {short_repr(record['rope_type'])}" if "rope_type" in record else "config.json"
        )
        raise ValueError(f"{of_type} has {field}={short_repr(value)}; it must be a number of at least {least:g}")
    return float(value)


def _factors(scaling: Mapping[str, Any], pairs: int, field: str = "factors") -> np.ndarray:
    factors = scaling.get(field)
    if not isinstance(factors, list) or len(factors) != pairs:
        raise ValueError(f"rope_scaling has {field}={short_repr(factors)}; it must be a list of {pairs} numbers")
    return np.array([_number({"rope_type": scaling["rope_type"], field: one}, field) for one in factors])


def _dynamic(plain: np.ndarray, base: float, scaling: Mapping[str, Any], longest: int) -> Rope:
    if len(plain) < 2:
        raise ValueError(f"head_dim={2 * len(plain)} is too small for rope_type 'dynamic'; it must be at least 4")
    return Rope(tuple(plain), longer=GrowingBase(longest, base, _number(scaling, "factor")))


def _longrope(plain: np.ndarray, scaling: Mapping[str, Any], trained: int, longest: int) -> Rope:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor a pair, others beyond the trained length."""
    short, long = (_factors(scaling, len(plain), field) for field in ("short_factor", "long_factor"))
    factor = longest / trained if scaling.get("factor") is None else _number(scaling, "factor")
    if scaling.get("attention_factor") is not None:
        attention_factor = _number(scaling, "attention_factor")
    elif factor <= 1:
        attention_factor = 1.0
    elif trained == 1:
        raise ValueError("original_max_position_embeddings=1 is too small for rope_type 'longrope'; it must be above 1")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(trained))
    return Rope(tuple(plain / short), attention_factor, LongFrequencies(trained, tuple(plain / long)))


def _proportional(plain: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Gemma 4's: of all pairs of a head the first are rotated, as many as `partial_rotary_factor` says."""
    names = ("partial_rotary_factor", "factor")
    part, factor = (1.0 if scaling.get(name) is None else _number(scaling, name) for name in names)
    if part > 1:
        raise ValueError(f"rope_scaling has partial_rotary_factor={part:g}; it must be at most 1")
    turning = np.arange(len(plain)) < int(part * len(plain))
    return np.where(turning, plain / factor, 0.0)


def _llama3(plain: np.ndarray, scaling: Mapping[str, Any], trained: int) -> np.ndarray:
    """Llama 3.1's scaling: low frequencies are divided by the factor, high ones kept, those between interpolated."""
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ValueError(
            f"rope_scaling has low_freq_factor={low} and high_freq_factor={high}; the second must be larger"
        )
    wavelength = 2 * math.pi / plain
    blend = np.clip((trained / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(plain: np.ndarray, base: float, head_dim: int, scaling: Mapping[str, Any], trained: int) -> Rope:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): low frequencies are divided by the factor, high ones kept."""
    factor = _number(scaling, "factor")
    if base <= 1:
        raise ValueError(f"rope_theta={base} is too small for rope_type 'yarn'; it must be above 1")

    def pair_turning(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair_turning(_number(scaling, "beta_fast", default=32))
    high = pair_turning(_number(scaling, "beta_slow", default=1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    interpolated = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = plain / factor * interpolated + plain * (1 - interpolated)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        attention_factor = _number(scaling, "attention_factor")
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention_factor = temperature(_number(scaling, "mscale")) / temperature(_number(scaling, "mscale_all_dim"))
    else:
        attention_factor = temperature(1.0)
    return Rope(tuple(frequencies), attention_factor)


def rotation(rope: Rope, positions: Int32[Array, " t"], lengths: Int32[Array, " t"]) -> Rotation:
    """The rotation of tokens at `positions`, computed in float32 and once for all layers.

    `lengths` is how long each token's sequence was when the token was added to it, which scaling of long sequences
    depends on.
    """
    angles = positions[:, None].astype(jnp.float32) * _frequencies(rope, lengths)
    both = jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
    # Without the barrier XLA computes the cosines again in every layer and for every head: a tenth of a CPU's prefill.
    return Rotation(*lax.optimization_barrier(both))


def _frequencies(rope: Rope, lengths: Array) -> Array:
    """Radians per position: [pairs], or [t, pairs] if they depend on the sequence's length."""
    plain = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.longer is None:
        return plain
    longer = rope.longer.frequencies(lengths, len(rope.frequencies))
    return jnp.where(lengths[:, None] > rope.longer.trained, longer, plain)
