"""Rotary position embedding and its scaled variants (Su et al. 2021, arXiv:2104.09864)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import Rotation


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
        scaling = _scaling(config)
        base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
        kind = scaling["rope_type"]
        plain = 1.0 / base ** (np.arange(0, head_dim, 2) / head_dim)
        longest = int(config.get("max_position_embeddings") or 2048)
        stated = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        trained = int(stated or longest)
        if kind == "default":
            return cls(tuple(plain))
        if kind == "linear":
            return cls(tuple(plain / _number(scaling, "factor")))
        if kind == "dynamic":
            return cls(tuple(plain), dynamic=(base, _number(scaling, "factor"), longest))
        if kind == "llama3":
            return cls(tuple(_llama3(plain, scaling, trained)))
        if kind == "yarn":
            return _yarn(plain, base, head_dim, scaling, trained)
        if kind == "frequency_factors":
            return cls(tuple(plain / np.asarray(scaling["factors"], np.float64)))
        raise ValueError(
            f"rope_scaling has rope_type {kind!r}, which is not supported; supported: default, linear, dynamic, "
            "llama3, yarn, frequency_factors"
        )


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
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return {**scaling, "rope_type": scaling.get("rope_type") or scaling.get("type") or "default"}


def _number(scaling: Mapping[str, Any], field: str) -> float:
    value = scaling.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"rope_scaling of rope_type {scaling['rope_type']!r} has {field}={value!r}; it must be a number"
        )
    return float(value)


def _llama3(plain: np.ndarray, scaling: Mapping[str, Any], trained: int) -> np.ndarray:
    """Llama 3.1's smoothed scaling: long wavelengths are slowed by the factor, short ones kept."""
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelength = 2 * math.pi / plain
    blend = np.clip((trained / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(plain: np.ndarray, base: float, head_dim: int, scaling: Mapping[str, Any], trained: int) -> Rope:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate the slow pairs, keep the fast, blend between."""
    factor = _number(scaling, "factor")

    def pair_turning(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair_turning(float(scaling.get("beta_fast") or 32))
    high = pair_turning(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    interpolated = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = plain / factor * interpolated + plain * (1 - interpolated)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
    return Rope(tuple(frequencies), float(attention_factor))


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
