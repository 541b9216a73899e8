"""Kernels with inputs that are not always there."""

from collections.abc import Callable, Sequence
from typing import Any


def with_absent(kernel: Callable[..., None], always: int, present: Sequence[bool]) -> Callable[..., None]:
    """`kernel` for a call that leaves inputs out: after the `always` first ones, None for each not `present`."""

    def run(*refs: Any) -> None:
        rest = iter(refs[always:])
        optional = [next(rest) if there else None for there in present]
        kernel(*refs[:always], *optional, *rest)

    return run
