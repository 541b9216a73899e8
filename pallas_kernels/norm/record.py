"""The record that describes a normalisation to whatever computes it."""

from dataclasses import dataclass, field
from typing import Literal

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis, of n channels, in float32.

    Attributes:
        weight: the factor on each normalised channel; it may differ from head to head.
        eps: the number added to the mean square, or to the variance; static.
        offset: the number added to the weight (Gemma stores the weight minus 1); static.
        bias: added at the end; None for none.
        kind: "rms" divides by the root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), "layer" subtracts the
            mean and divides by the standard deviation (Ba et al. 2016, arXiv:1607.06450); static.
    """

    weight: Float[Array, "*heads n"]
    eps: float = field(metadata={"static": True})
    offset: float = field(default=0.0, metadata={"static": True})
    bias: Float[Array, " n"] | None = None
    kind: Literal["rms", "layer"] = field(default="rms", metadata={"static": True})

    @property
    def in_kernels(self) -> bool:
        """Whether the kernels can compute it; XLA can compute every norm."""
        return self.kind == "rms" and self.bias is None and self.weight.ndim == 1
