"""Products of activations with large weights."""

from pallas_kernels.matmul.api import adds_residual, gated_linear, linear
from pallas_kernels.matmul.pallas_triton import Norm
from pallas_kernels.matmul.tuned import Config, Wide

__all__ = ["Config", "Norm", "Wide", "adds_residual", "gated_linear", "linear"]
