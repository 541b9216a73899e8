"""Attention over a paged key-value cache, and of whole sequences without one."""

from pallas_kernels.attention.api import append_and_attend, cache_shape
from pallas_kernels.attention.dense import attend
from pallas_kernels.attention.head_norms import HeadNorms, normalise_queries_and_keys
from pallas_kernels.attention.locations import PageLocations
from pallas_kernels.attention.masks import Scoring
from pallas_kernels.attention.rotary import Rotation, rotate, rotate_queries_and_keys

__all__ = [
    "HeadNorms",
    "PageLocations",
    "Rotation",
    "Scoring",
    "append_and_attend",
    "attend",
    "cache_shape",
    "normalise_queries_and_keys",
    "rotate",
    "rotate_queries_and_keys",
]
