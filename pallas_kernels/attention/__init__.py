"""Attention over a paged key-value cache."""

from pallas_kernels.attention.api import cache_shape, paged_attention, write_pages

__all__ = ["cache_shape", "paged_attention", "write_pages"]
