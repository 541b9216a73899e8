"""Which GPU computes: what the operations choose their kernels by."""

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def gpu_kind() -> str:
    """The name of the GPU that computes; empty where none does."""
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""


def is_hopper() -> bool:
    """Whether that GPU has Hopper's tensor cores and copies (compute capability 9.0)."""
    kind = gpu_kind()
    return any(name in kind for name in HOPPER)
