"""Puts the Python side of Triton's dialect where MLIR looks for it.

MLIR looks for a type's dialect by its name, `tt`, among jaxlib's dialects, and again for every value of a type that it
did not find there; jaxlib keeps it elsewhere (seen in 0.10.2 and 0.11.2). One kernel's lowering made thousands of such
searches through the file system.
"""

import sys

from jaxlib.triton import dialect

sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)
