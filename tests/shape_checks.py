"""Checks of annotated shapes and dtypes, by jaxtyping's import hook and beartype, which only test processes have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

MODULES = (
    "pallas_kernels.attention.api",
    "pallas_kernels.attention.blocks",
    "pallas_kernels.attention.dense",
    "pallas_kernels.attention.masks",
    "pallas_kernels.attention.pallas_decode",
    "pallas_kernels.attention.rotary",
    "pallas_kernels.attention.xla",
    "pallas_kernels.matmul.api",
    "pallas_kernels.norm.api",
    "pallas_kernels.norm.record",
    "pallas_kernels.sampling.api",
    "pallas_kernels.weights",
    "trtllm_jax.engine.sampler",
    "trtllm_jax.nn.batch",
    "trtllm_jax.nn.forward",
    "trtllm_jax.nn.layers",
    "trtllm_jax.nn.model",
    "trtllm_jax.nn.rope",
)

_CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its arguments and result checked.

    The fields of records are not, because JAX makes pytrees with leaves of any kind.
    """
    return function if function.__name__ == "__init__" else _CHECKED(function)


def install() -> None:
    """Check every function of MODULES that are imported after this call."""
    install_import_hook(MODULES, f"{__name__}.check")
