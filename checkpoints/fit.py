"""Whether what a checkpoint holds is what a model needs."""

import fnmatch
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from checkpoints.error_text import one_line
from checkpoints.source import TensorInfo


def require_fit(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo], ignore: Sequence[str] = ()
) -> None:
    """ValueError, with every missing, unused and misshapen name, unless `found` has the `expected` shapes in floats.

    Names that an `ignore` pattern (as in fnmatch) matches may be there unused.
    """
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    for name in sorted(found.keys() - expected.keys()):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            problems.append(f"unused: {one_line(name, 200)}")
    for name in sorted(expected.keys() & found.keys()):
        if found[name].shape != expected[name]:
            problems.append(f"{name}: expected the shape {expected[name]}, found {found[name].shape}")
        elif not jnp.issubdtype(np.dtype(found[name].dtype), jnp.floating):
            problems.append(f"{name}: expected floating point numbers, found {found[name].dtype}")
    if problems:
        raise ValueError(
            "the checkpoint does not fit the architecture and sizes that its configuration states; give the one that "
            "it was saved with, or the missing files:\n  " + "\n  ".join(problems)
        )
