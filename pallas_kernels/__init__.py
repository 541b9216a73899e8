"""Kernels and their XLA references: a folder for each operation, with the public functions in its `api.py`."""

from pallas_kernels import triton_dialect as _  # noqa: F401
