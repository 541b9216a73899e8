"""Kernels and their XLA references, one folder an operation, behind one public function each."""

from pallas_kernels import triton_dialect as _  # noqa: F401
