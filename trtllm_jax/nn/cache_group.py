"""The layers whose caches are allocated, freed and reused together."""

from dataclasses import dataclass


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
