"""Sampling of a token for each row from its logits."""

from pallas_kernels.sampling.api import greedy, sample

__all__ = ["greedy", "sample"]
