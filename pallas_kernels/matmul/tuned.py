"""Tile sizes of the matmul kernel: data, written from what `benchmarks/matmul.py` measured."""

from collections.abc import Mapping
from typing import NamedTuple


class Config(NamedTuple):
    """How the kernel divides a product of x [m, k] and w [n, k]; tile sizes are powers of two.

    Attributes:
        block_n: outputs of a program; with tensor cores at least 16.
        block_m: rows of a program. Below 16, rows are multiplied one by one outside the tensor cores.
        block_k: inputs read at once; divides k. With tensor cores at least 16.
        splits: programs that share the inputs of one tile; what each found is added up outside the kernel.
        num_warps: warps of a program.
        num_stages: reads in flight, in blocks; no more than one without tensor cores.
        normalises: whether the kernel normalises its rows itself: one kernel fewer, but work for each of its programs.
    """

    block_n: int
    block_m: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    normalises: bool = True

    @property
    def tensor_cores(self) -> bool:
        """Whether the rows suffice for a dot of the tensor cores."""
        return self.block_m >= MIN_DOT

    def takes(self, k: int) -> bool:
        """Whether the kernel can run with these sizes for weights of k inputs."""
        return k % self.block_k == 0 and self.splits <= k // self.block_k


MIN_DOT = 16
"""The least extent of a Triton dot in any direction."""

Rows = Mapping[int, Config | None]
"""From the most rows that a choice is for to the choice; None is XLA."""

MEASURED: dict[str, dict[tuple[int, int, bool], Rows]] = {
    "H100": {
        (6144, 4096, False): {
            1: Config(16, 1, 512, 1, 4, 1),
            16: Config(64, 16, 256, 1, 4, 4),
            32: Config(64, 32, 256, 1, 4, 4),
            64: Config(64, 64, 256, 1, 4, 3, normalises=False),
            128: Config(128, 128, 64, 1, 4, 6, normalises=False),
            256: Config(128, 128, 64, 1, 4, 6, normalises=False),
        },
        (4096, 4096, False): {
            1: Config(16, 1, 1024, 1, 8, 1),
            16: Config(64, 16, 256, 1, 4, 4),
            32: Config(64, 32, 128, 1, 4, 6),
            64: Config(64, 64, 128, 1, 4, 6),
        },
        (14336, 4096, True): {
            1: Config(4, 1, 1024, 1, 4, 1),
            16: Config(128, 16, 128, 1, 8, 3, normalises=False),
            32: Config(128, 32, 128, 1, 8, 3),
            64: None,
            128: Config(64, 128, 128, 1, 4, 3, normalises=False),
        },
        (4096, 14336, False): {
            16: Config(32, 16, 512, 1, 4, 4),
            32: Config(64, 32, 128, 1, 4, 6),
            64: Config(128, 64, 128, 3, 8, 4),
            128: Config(128, 128, 64, 2, 4, 6),
        },
    },
}
"""From a part of the device's name, by (n, k, gated) and the most rows, to what was fastest; None is XLA."""


def choose(device_kind: str, m: int, n: int, k: int, gated: bool) -> Config | None:
    """The fastest configuration known for m rows; None for XLA, which also takes every shape that nobody measured."""
    for name, shapes in MEASURED.items():
        if name in device_kind:
            rows = shapes.get((n, k, gated), {})
            bucket = min((most for most in rows if most >= m), default=None)
            return None if bucket is None else rows[bucket]
    return None
