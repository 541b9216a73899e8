"""Kernels and their XLA references, one folder an operation, behind one public function each."""
