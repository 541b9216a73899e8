"""Cache groups: which layers' caches are allocated, freed and reused together, and what a page of them holds."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class PageArray(NamedTuple):
    """What a page has of one array of a layer's cache.

    Attributes:
        shape: of one page.
        axes: the logical axis of each dimension, by which it is split over devices.
        dtype: its name; None for the cache's own.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str | None = None


class LayerCache(Protocol):
    """What one layer's cache is made of. Pages are copied whole, array by array."""

    def page(self, page_size: int) -> Any:
        """A pytree of `PageArray`: the arrays of a page of so many tokens, without the axis of the pages."""

    def padded(self, sizes: Any) -> "LayerCache":
        """The same with the axes that `sizes` names as large as it says, as the layer's weights are padded."""
        ...


@dataclass(frozen=True)
class KeysAndValues:
    """Keys and values of every token, in the layout that `pallas_kernels.attention` knows.

    Attributes:
        kv_heads: key-value heads.
        head_dim: channels of a head.
    """

    kv_heads: int
    head_dim: int

    def page(self, page_size: int) -> PageArray:
        """One array of keys and values."""
        return PageArray(page_shape(self.kv_heads, page_size, self.head_dim), ("both", "kv_heads", "page_size", "head_dim"))

    def padded(self, sizes: Any) -> "KeysAndValues":
        """With as many heads as `sizes` says."""
        return KeysAndValues(sizes.get("kv_heads", self.kv_heads), self.head_dim)


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose caches are allocated, freed and reused together.

    Attributes:
        layers: indices of the layers.
        cache: what each of these layers keeps.
        window: tokens that a token reads, its own included; None for all before it. It decides when a page is given
            back, and of which pages a cached prefix is made.
    """

    layers: tuple[int, ...]
    cache: LayerCache
    window: int | None = None
