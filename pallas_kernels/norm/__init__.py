"""Normalisation of the residual stream."""

from pallas_kernels.norm.api import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
