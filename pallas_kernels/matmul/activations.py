"""The activation functions of gated products."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import jax

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]

ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jax.nn.relu(x) ** 2,
}
"""SiLU, GELU and its approximation by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415), ReLU, and ReLU squared (So et
al. 2021, arXiv:2109.08668)."""
