"""Registers the Python module of Triton's MLIR dialect under the name by which MLIR imports it.

MLIR imports the module of a dialect by its name, `tt`, from `jaxlib.mlir.dialects`, and tries again for every value of
the dialect's types while the import fails. jaxlib keeps the module elsewhere (0.10.2 and 0.11.2), so that lowering one
kernel searched the file system thousands of times.
"""

import sys

from jaxlib.triton import dialect

sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)
