"""Attention over a paged key-value cache."""

from pallas_kernels.attention.api import append_and_attend, cache_shape
from pallas_kernels.attention.masks import Scoring
from pallas_kernels.attention.rotary import Rotation, rotate

__all__ = ["Rotation", "Scoring", "append_and_attend", "cache_shape", "rotate"]
