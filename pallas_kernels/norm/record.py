"""A normalisation as a record, which whoever computes it takes."""

from dataclasses import dataclass, field
from typing import Literal

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis, of n channels, in float32.

    Attributes:
        weight: [n], what the normalised channels are multiplied by.
        eps: what is added to the mean square, or to the variance; static.
        offset: what is added to the weight (Gemma stores it less 1); static.
        bias: [n], added at the end; None for none.
        kind: "rms" divides by the root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), "layer" subtracts the
            mean and divides by the standard deviation (Ba et al. 2016, arXiv:1607.06450); static.
    """

    weight: jax.Array
    eps: float = field(metadata={"static": True})
    offset: float = field(default=0.0, metadata={"static": True})
    bias: jax.Array | None = None
    kind: Literal["rms", "layer"] = field(default="rms", metadata={"static": True})

    @property
    def in_kernels(self) -> bool:
        """Whether the kernels compute it; XLA computes all."""
        return self.kind == "rms" and self.bias is None
