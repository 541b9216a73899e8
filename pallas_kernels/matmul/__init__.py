"""Products of activations with large weights."""

from pallas_kernels.matmul.activations import ACTIVATIONS, Activation
from pallas_kernels.matmul.api import adds_residual, gated_linear, linear
from pallas_kernels.matmul.tiles import Config, Wide

__all__ = ["ACTIVATIONS", "Activation", "Config", "Wide", "adds_residual", "gated_linear", "linear"]
