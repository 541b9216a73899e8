"""What every architecture's configuration shares: careful reading of config.json, and the cache it asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose cache is allocated, freed and reused together: full attention, every token kept.

    Attributes:
        layers: indices of the layers.
        kv_heads: key-value heads of the whole model.
        head_dim: channels of a head.
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int


def positive(config: Mapping[str, Any], field: str, *, default: int | None = None) -> int:
    """`config[field]` as a positive int, `default` where it is absent or null."""
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json lacks {field}; the model folder is incomplete or of another architecture")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json has {field}={value!r}; it must be a whole number of at least 1")
    return value


def require(config: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    """Refuse a configuration whose field holds something that the layers do not compute; absent means the first."""
    for field, values in allowed.items():
        value = config.get(field, values[0])
        if value not in values:
            raise ValueError(f"config.json has {field}={value!r}; supported here: {', '.join(map(repr, values))}")
