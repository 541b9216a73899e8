"""Cache groups: which layers' caches are allocated, freed and reused together, and what a page of them holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

from pallas_kernels.attention import cache_shape


class PageArray(NamedTuple):
    """What a page has of one array of a layer's cache; on the devices an axis of pages comes first.

    Attributes:
        shape: of one page.
        axes: the logical axis of each dimension, by which it is split over devices.
        dtype: its name; None for the cache's own.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str | None = None


class LayerCache(Protocol):
    """What one layer's cache is made of: a pytree of arrays whose pages are copied whole."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The model's own extents of the logical axes that a mesh may split."""
        ...

    def resized(self, sizes: Mapping[str, int]) -> Self:
        """The same with the extents that the arrays have on a mesh, padded or repeated as those of the weights are."""
        ...

    def page(self, page_size: int) -> Any:
        """A pytree of `PageArray`: what a page of so many tokens holds."""
        ...


@dataclass(frozen=True)
class KeysAndValues:
    """Keys and values of every token in one array, in the layout that `pallas_kernels.attention` reads.

    Attributes:
        kv_heads: key-value heads.
        head_dim: channels of a head.
    """

    kv_heads: int
    head_dim: int

    @property
    def sizes(self) -> Mapping[str, int]:
        """Heads may be split."""
        return {"kv_heads": self.kv_heads}

    def resized(self, sizes: Mapping[str, int]) -> "KeysAndValues":
        """With the heads that the arrays have on a mesh."""
        return KeysAndValues(sizes["kv_heads"], self.head_dim)

    def page(self, page_size: int) -> PageArray:
        """One array."""
        _, *shape = cache_shape(1, self.kv_heads, page_size, self.head_dim)
        return PageArray(tuple(shape), ("both", "kv_heads", "page_size", "head_dim"))


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose caches are allocated, freed and reused together.

    Attributes:
        layers: indices of the layers.
        cache: what each of these layers keeps.
        window: tokens that a token reads, its own included; None for all before it. It decides when a page is given
            back, and which pages make a cached prefix.
    """

    layers: tuple[int, ...]
    cache: LayerCache
    window: int | None = None
