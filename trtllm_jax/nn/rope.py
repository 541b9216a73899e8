"""Rotary position embedding and its scaled variants (Su et al. 2021, arXiv:2104.09864)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from checkpoints.error_text import short_repr
from pallas_kernels.attention import Rotation

MOST = 1e30  # of any number: what is computed from two of them stays within float64


@dataclass(frozen=True)
class Rope:
    """Rotation frequencies of one attention head, resolved from a model's configuration.

    Attributes:
        frequencies: radians a position for each of the head_dim / 2 pairs.
        attention_factor: factor on cosine and sine (yarn's temperature; 1 otherwise).
        dynamic: (base, factor, trained length) where the base grows with the sequence (dynamic NTK), else None.
    """

    frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    dynamic: tuple[float, float, int] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> "Rope":
        """The rope that a Hugging Face configuration asks for; ValueError names what is unknown or missing."""
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd; rotary embedding needs pairs of channels")
        scaling = _scaling(config)
        base = _number(scaling if scaling.get("rope_theta") else config, "rope_theta", default=10000.0)
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
        if kind == "frequency_factors":
            return cls(tuple(plain / _factors(scaling, len(plain))))
        raise ValueError(
            f"rope_scaling has rope_type {short_repr(kind)}, which is not supported; supported: default, linear, "
            "dynamic, llama3, yarn, frequency_factors"
        )


def of_layer_type(
    config: Mapping[str, Any], layer_type: str, base: tuple[str, float], *, scaled: bool = True
) -> dict[str, Any]:
    """The configuration with the rope of the layers of one type, for `Rope.from_config`.

    `rope_parameters` has a record for each type. Files before transformers 5 have none: there `base` names the field of
    the base and its default, and `rope_scaling` is for the layers that are `scaled`.
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
    return {**config, "rope_scaling": None, "rope_parameters": {"rope_theta": stated, **record, **(scaling or {})}}


def context_stretch(config: Mapping[str, Any]) -> float:
    """How many times max_position_embeddings a sequence may be long: linear and dynamic scaling state what was trained.

    The other types state the stretched length. TensorRT-LLM infers max_seq_len by the same rule.
    """
    scaling = _scaling(config)
    return _number(scaling, "factor") if scaling["rope_type"] in ("linear", "dynamic") else 1.0


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling record of either spelling, `rope_type` filled in.

    As in transformers, rope_scaling outweighs rope_parameters: people add it to a file to stretch a model's context.
    """
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(field) or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"config.json has {field}={short_repr(scaling)}; it must be an object")
    return {**scaling, "rope_type": scaling.get("rope_type") or scaling.get("type") or "default"}


def _number(record: Mapping[str, Any], field: str, *, default: float | None = None, least: float = 1e-30) -> float:
    """`record[field]` as a number that float32 holds, from `least`; `default` where it is absent, null or 0."""
    value = record.get(field)
    if default is not None and not isinstance(value, bool) and value in (None, 0):
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= MOST:
        of_type = (
            f"rope_scaling of rope_type {short_repr(record['rope_type'])}" if "rope_type" in record else "config.json"
        )
        raise ValueError(f"{of_type} has {field}={short_repr(value)}; it must be a number of at least {least:g}")
    return float(value)


def _factors(scaling: Mapping[str, Any], pairs: int) -> np.ndarray:
    factors = scaling.get("factors")
    if not isinstance(factors, list) or len(factors) != pairs:
        raise ValueError(f"rope_scaling has factors={short_repr(factors)}; it must be a list of {pairs} numbers")
    return np.array([_number({"rope_type": scaling["rope_type"], "factors": one}, "factors") for one in factors])


def _dynamic(plain: np.ndarray, base: float, scaling: Mapping[str, Any], longest: int) -> Rope:
    if len(plain) < 2:
        raise ValueError(f"head_dim={2 * len(plain)} is too small for rope_type 'dynamic'; it must be at least 4")
    return Rope(tuple(plain), dynamic=(base, _number(scaling, "factor"), longest))


def _llama3(plain: np.ndarray, scaling: Mapping[str, Any], trained: int) -> np.ndarray:
    """Llama 3.1's smoothed scaling: long wavelengths are slowed by the factor, short ones kept."""
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ValueError(
            f"rope_scaling has low_freq_factor={low} and high_freq_factor={high}; the second must be larger"
        )
    wavelength = 2 * math.pi / plain
    blend = np.clip((trained / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(plain: np.ndarray, base: float, head_dim: int, scaling: Mapping[str, Any], trained: int) -> Rope:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate the slow pairs, keep the fast, blend between."""
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


def rotation(rope: Rope, positions: jax.Array, lengths: jax.Array) -> Rotation:
    """The rotation of tokens at `positions` [t], computed once for all layers and in float32.

    `lengths` [t] are the sequence's tokens when the token entered it; only dynamic scaling looks at them.
    """
    angles = positions[:, None].astype(jnp.float32) * _frequencies(rope, lengths)
    both = jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
    # XLA would otherwise compute cosines again in every layer and for every head: a tenth of a prefill on a CPU.
    return Rotation(*lax.optimization_barrier(both))


def _frequencies(rope: Rope, lengths: jax.Array) -> jax.Array:
    """Radians a position: [pairs], or [t, pairs] where the base depends on the sequence's length."""
    plain = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.dynamic is None:
        return plain
    base, factor, trained = rope.dynamic
    dim = 2 * len(rope.frequencies)
    length = jnp.maximum(lengths, trained)[:, None].astype(jnp.float32)
    grown = base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / grown ** (jnp.arange(0, dim, 2) / dim)
