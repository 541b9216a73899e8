"""How large the paged KV cache is, and its arrays."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.devices import Platform
from sharding import ShardingRules
from trtllm_jax.engine import device_memory
from trtllm_jax.engine.cache_manager import pool_pages
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.nn.cache_group import CacheGroup, PageArray

CPU_POOL_BYTES = 1 << 30
"""Size of the pool where no device memory limits it."""


@dataclass(frozen=True)
class CacheSpec:
    """One model's paged cache on one mesh.

    Attributes:
        groups: the layers and what they keep, resized to the mesh.
        page_size: tokens of a page.
        dtype: of keys and values.
        rules: where arrays live.
    """

    groups: tuple[CacheGroup, ...]
    page_size: int
    dtype: jnp.dtype
    rules: ShardingRules

    @classmethod
    def of(
        cls, groups: Sequence[CacheGroup], sizes: Mapping[str, int], page_size: int, dtype: jnp.dtype, mesh: Mesh
    ) -> "CacheSpec":
        """The cache of a model's `groups`, with heads padded or repeated as those of its weights, of `sizes`, are."""
        rules = ShardingRules(mesh)
        placed = []
        for group in groups:
            extents = rules.extents({**sizes, **group.cache.sizes})
            cache = group.cache.resized({axis: extents[axis] for axis in group.cache.sizes})
            placed.append(replace(group, cache=cache))
        return cls(tuple(placed), page_size, dtype, rules)

    def arrays(self, pages: Sequence[int]) -> tuple[Any, ...]:
        """The caches in the order of their layers, as shapes, dtypes and shardings, for so many pages of each group."""
        of_layer = {
            layer: self._layer(group, count)
            for group, count in zip(self.groups, pages, strict=True)
            for layer in group.layers
        }
        return tuple(of_layer[layer] for layer in sorted(of_layer))

    def pages(self, columns: int, limits: SchedulerLimits) -> tuple[int, ...]:
        """The pages of each group, beside so many of a group that keeps all tokens; with the padding pages."""
        return tuple(pool_pages(group.reach, columns, limits, self.page_size) for group in self.groups)

    def bytes_of(self, pages: Sequence[int]) -> int:
        """Bytes of so many pages of each group on one device."""
        return sum(self.page_bytes(group) * count for group, count in zip(self.groups, pages, strict=True))

    def page_bytes(self, group: CacheGroup) -> int:
        """Bytes of one page of a group on one device, over all its layers."""
        leaves = jax.tree.leaves(self._layer(group, 1))
        of_layer = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        return of_layer * len(group.layers)

    def allocate(self, pages: Sequence[int]) -> tuple[Any, ...]:
        """Empty caches. Nothing relies on their zeros: attention sees what a row wrote, whatever a page held before."""
        arrays = self.arrays(pages)
        make = jax.jit(
            lambda: jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), arrays),
            out_shardings=jax.tree.map(lambda array: array.sharding, arrays),
        )
        caches: tuple[Any, ...] = make()
        return caches

    def _layer(self, group: CacheGroup, pages: int) -> Any:
        def array(of_page: PageArray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                (pages, *of_page.shape),
                jnp.dtype(of_page.dtype or self.dtype),
                sharding=self.rules.sharding(("pages", *of_page.axes)),
            )

        return jax.tree.map(array, group.cache.page(self.page_size), is_leaf=lambda leaf: isinstance(leaf, PageArray))


def pool_columns(
    spec: CacheSpec,
    mesh: Mesh,
    limits: SchedulerLimits,
    fraction: float,
    temporary_bytes: int,
    wanted_tokens: int | None,
) -> int:
    """How many columns of pages fit, the padding page's included: as many as asked for, or a fraction of free memory.

    `spec.pages` says what they are in each group; a group that keeps every token has a page a column. On a GPU the
    largest step's temporary bytes are left free, and the number is rounded down coarsely, so that compiled steps can
    be used again although free memory varies a little. A CPU's pool has `CPU_POOL_BYTES`, or what was asked for.
    MemoryError names the knobs when that does not fit, or not even one page.
    """
    on_cpu = Platform.of(mesh).on_cpu
    if on_cpu:
        # The devices that a CPU plays share its memory.
        free = CPU_POOL_BYTES if wanted_tokens is None else device_memory.of_host() // len(mesh.local_devices)
    else:
        free = int((device_memory.free_bytes(mesh) or 0) * fraction) - temporary_bytes
    fitting = _fitting(spec, limits, free)
    if wanted_tokens is not None:
        wanted = 1 - (-wanted_tokens // spec.page_size)
        if wanted > fitting:
            most = max(fitting - 1, 0) * spec.page_size
            there = "of memory are there for each device" if on_cpu else "are free"
            needed = spec.bytes_of(spec.pages(wanted, limits))
            raise MemoryError(
                f"kv_cache_config.max_tokens={wanted_tokens} needs {needed / 2**30:.1f} GiB for the KV "
                f"cache, {max(free, 0) / 2**30:.1f} GiB {there}; ask for at most {most}"
            )
        return wanted
    if fitting > 4096:
        fitting -= fitting % 1024
    if fitting < 2:
        needed = spec.bytes_of(spec.pages(2, limits))
        raise MemoryError(
            f"no room for a KV cache: two pages need {needed / 2**30:.2f} GiB, and of the device's memory "
            f"{max(free, 0) / 2**30:.2f} GiB are left beside {temporary_bytes / 2**30:.2f} GiB for the largest step; "
            "lower max_num_tokens or kv_cache_config.tokens_per_block, raise kv_cache_config.free_gpu_memory_fraction "
            "or tensor_parallel_size"
        )
    return fitting


def _fitting(spec: CacheSpec, limits: SchedulerLimits, free: int) -> int:
    """The most columns whose pages take no more than the free bytes."""
    least = min(spec.page_bytes(group) for group in spec.groups)
    columns = range(max(free, 0) // least + 2)
    return bisect_right(columns, free, key=lambda column: spec.bytes_of(spec.pages(column, limits))) - 1
