"""Checked access to the fields of a config.json, for every architecture."""

from collections.abc import Mapping
from typing import Any

from checkpoints.error_text import short_repr
from trtllm_jax.common.numbers import FLOAT32_MAX, INT32_MAX

MAX_LAYERS = 10_000
MAX_HEAD_DIM = 65_536


def model_name(config: Mapping[str, Any]) -> str:
    """The first name of `architectures` without what the model is for: "Olmo3" of "Olmo3ForCausalLM"; "" for none."""
    stated = config.get("architectures") or ""
    return str(stated[0] if isinstance(stated, list) else stated).partition("For")[0]


def text_config(config: Mapping[str, Any], *, tied_beside: bool = True) -> dict[str, Any]:
    """The language model's part of the configuration of one that sees or hears too; ValueError if it is no object.

    Whether embeddings are tied is said beside it, if `tied_beside`, and in older files in it.
    """
    text = config["text_config"]
    if not isinstance(text, dict):
        raise ValueError(f"config.json has text_config={short_repr(text)}; it must be an object")
    tied = config.get("tie_word_embeddings") if tied_beside else None
    return dict(text) if tied is None else {**text, "tie_word_embeddings": tied}


def positive(config: Mapping[str, Any], field: str, *, default: int | None = None, most: int = INT32_MAX) -> int:
    """`config[field]` as an int from 1 to `most`; `default` if it is absent or null."""
    return count(config, field, default=default, least=1, most=most)


def count(
    config: Mapping[str, Any], field: str, *, default: int | None = None, least: int = 0, most: int = INT32_MAX
) -> int:
    """`config[field]` as an int from `least` to `most`; `default` if it is absent or null."""
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json lacks {field}; the model folder is incomplete or of another architecture")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(
            f"config.json has {field}={short_repr(value)}; it must be a whole number from {least} to {most}"
        )
    return value


def number(config: Mapping[str, Any], field: str, *, default: float) -> float:
    """`config[field]` as a finite float of at least 0; `default` if it is absent or null."""
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < FLOAT32_MAX:
        raise ValueError(f"config.json has {field}={short_repr(value)}; it must be a number of at least 0")
    return float(value)


def above_zero(config: Mapping[str, Any], field: str) -> float | None:
    """`config[field]` as a finite float above 0; None if it is absent or null."""
    value = config.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value < FLOAT32_MAX:
        raise ValueError(f"config.json has {field}={short_repr(value)}; it must be a number above 0")
    return float(value)


def flag(config: Mapping[str, Any], field: str) -> bool:
    """`config[field]` as a bool; False if it is absent or null."""
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json has {field}={short_repr(value)}; it must be true or false")
    return bool(value)


def require(config: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    """Raise ValueError for a field whose value is not among those allowed; an absent field has the first of them."""
    for field, values in allowed.items():
        value = config.get(field, values[0])
        if value not in values:
            raise ValueError(
                f"config.json has {field}={short_repr(value)}; supported here: {', '.join(map(repr, values))}"
            )
