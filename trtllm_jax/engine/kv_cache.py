"""How large the paged KV cache is, and its arrays."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.attention import cache_shape
from sharding import ShardingRules
from trtllm_jax.engine import device_memory
from trtllm_jax.nn.cache_group import CacheGroup

CPU_POOL_BYTES = 1 << 30
"""Size of the pool where no device memory limits it."""

CACHE_AXES = ("pages", "both", "kv_heads", "page_size", "head_dim")


@dataclass(frozen=True)
class CacheSpec:
    """One model's paged cache on one mesh.

    Attributes:
        group: the layers and the shape of their entries, heads as the mesh has them, padded or repeated.
        page_size: tokens of a page.
        dtype: of keys and values.
    """

    group: CacheGroup
    page_size: int
    dtype: jnp.dtype

    def arrays(self, pages: int, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Every layer's cache as a shape, a dtype and a sharding."""
        shape = cache_shape(pages, self.group.kv_heads, self.page_size, self.group.head_dim)
        array = jax.ShapeDtypeStruct(shape, self.dtype, sharding=ShardingRules(mesh).sharding(CACHE_AXES))
        return (array,) * len(self.group.layers)

    def page_bytes(self, mesh: Mesh) -> int:
        """Bytes of one page on one device, over all layers."""
        (array, *_) = self.arrays(1, mesh)
        local = array.sharding.shard_shape(array.shape)
        size = jnp.dtype(self.dtype).itemsize
        for extent in local:
            size *= extent
        return size * len(self.group.layers)

    def allocate(self, pages: int, mesh: Mesh) -> tuple[jax.Array, ...]:
        """Empty caches. Nothing relies on their zeros: attention sees what a row wrote, whatever a page held before."""
        arrays = self.arrays(pages, mesh)
        make = jax.jit(
            lambda: tuple(jnp.zeros(array.shape, array.dtype) for array in arrays),
            out_shardings=tuple(array.sharding for array in arrays),
        )
        caches: tuple[jax.Array, ...] = make()
        return caches


def pool_pages(spec: CacheSpec, mesh: Mesh, fraction: float, temporary_bytes: int, wanted_tokens: int | None) -> int:
    """Pages that fit, the padding page included: as many as asked for, or a fraction of what memory is free.

    On a GPU the largest step's temporary bytes are left free, and the number is rounded down coarsely, so that
    compiled steps can be used again although free memory varies a little. A CPU's pool has `CPU_POOL_BYTES`, or what
    was asked for. MemoryError names the knobs when that does not fit, or not even one page.
    """
    page_bytes = spec.page_bytes(mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if on_cpu:
        # The devices that a CPU plays share its memory.
        free = CPU_POOL_BYTES if wanted_tokens is None else device_memory.of_host() // len(mesh.local_devices)
    else:
        free = int((device_memory.free_bytes(mesh) or 0) * fraction) - temporary_bytes
    fitting = free // page_bytes
    if wanted_tokens is not None:
        wanted = 1 - (-wanted_tokens // spec.page_size)
        if wanted > fitting:
            most = max(fitting - 1, 0) * spec.page_size
            there = "of memory are there for each device" if on_cpu else "are free"
            raise MemoryError(
                f"kv_cache_config.max_tokens={wanted_tokens} needs {wanted * page_bytes / 2**30:.1f} GiB for the KV "
                f"cache, {max(free, 0) / 2**30:.1f} GiB {there}; ask for at most {most}"
            )
        return wanted
    if fitting > 4096:
        fitting -= fitting % 1024
    if fitting < 2:
        raise MemoryError(
            f"no room for a KV cache: two pages need {2 * page_bytes / 2**30:.2f} GiB, and of the device's memory "
            f"{max(free, 0) / 2**30:.2f} GiB are left beside {temporary_bytes / 2**30:.2f} GiB for the largest step; "
            "lower max_num_tokens or kv_cache_config.tokens_per_block, raise kv_cache_config.free_gpu_memory_fraction "
            "or tensor_parallel_size"
        )
    return fitting
