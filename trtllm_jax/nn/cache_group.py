"""Cache groups: the layers whose caches are allocated, freed and reused together, and the contents of their pages.

A layer in no group keeps nothing of its own: it may read the cache of one that does, or needs none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self

from pallas_kernels.attention import cache_shape
from trtllm_jax.nn.reach import EVERYTHING, Reach


class PageArray(NamedTuple):
    """One page of an array of a layer's cache; the array itself has an axis of pages before these.

    Attributes:
        shape: the shape of a page.
        axes: the logical axis of each dimension, which decides how it is sharded.
        dtype: the dtype's name; None for the cache's own dtype.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str | None = None


class LayerCache(Protocol):
    """The description of a layer's cache, which is a pytree of arrays that are copied page by page."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The model's sizes of the logical axes that a mesh may shard."""
        ...

    def resized(self, sizes: Mapping[str, int]) -> Self:
        """The same cache with the sizes that its arrays have on a mesh, padded or repeated as those of the weights."""
        ...

    def page(self, page_size: int) -> Any:
        """The arrays of a page of `page_size` tokens, as a pytree of `PageArray`."""
        ...


@dataclass(frozen=True)
class KeysAndValues:
    """The keys and values of every token in one array, in the layout that `pallas_kernels.attention` reads.

    Attributes:
        kv_heads: the number of key-value heads.
        head_dim: the number of channels of a head.
        axis: the logical axis of the heads, that of the weights that make them.
    """

    kv_heads: int
    head_dim: int
    axis: str = "kv_heads"

    @property
    def sizes(self) -> Mapping[str, int]:
        """The heads, which a mesh may shard."""
        return {self.axis: self.kv_heads}

    def resized(self, sizes: Mapping[str, int]) -> "KeysAndValues":
        """The same cache with the number of heads that its arrays have on a mesh."""
        return replace(self, kv_heads=sizes[self.axis])

    def page(self, page_size: int) -> PageArray:
        """The one array of a page."""
        _, *shape = cache_shape(1, self.kv_heads, page_size, self.head_dim)
        return PageArray(tuple(shape), ("both", self.axis, "page_size", "head_dim"))


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose caches are allocated, freed and reused together.

    Attributes:
        layers: the indices of the layers.
        cache: the cache of each of these layers.
        reach: which tokens a token attends to. It decides when a page is freed, and which pages a cached prefix needs.
    """

    layers: tuple[int, ...]
    cache: LayerCache
    reach: Reach = EVERYTHING


def places(groups: Iterable[CacheGroup]) -> dict[int, int]:
    """The place of each layer that has a cache among all caches, which are in the order of their layers."""
    return {layer: place for place, layer in enumerate(sorted(layer for group in groups for layer in group.layers))}
