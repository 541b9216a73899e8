"""Normalisation of the residual stream."""

from pallas_kernels.norm.api import add_and_normalise, normalise
from pallas_kernels.norm.record import Norm

__all__ = ["Norm", "add_and_normalise", "normalise"]
