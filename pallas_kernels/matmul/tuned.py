"""Tile sizes of the matmul kernels: data, written from what was measured."""

from collections.abc import Mapping
from typing import NamedTuple


class Config(NamedTuple):
    """How the kernel for few rows divides a product of x [m, k] and w [n, k]; tile sizes are powers of two.

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

    def takes(self, m: int, n: int, k: int) -> bool:
        """Whether the kernel can run with these sizes."""
        return k % self.block_k == 0 and self.splits <= k // self.block_k


class Wide(NamedTuple):
    """How the kernel for many rows divides a product of x [m, k] and w [n, k]: tiles of 128 rows.

    Attributes:
        tile_n: outputs of a tile; divides n. Those of both planes of a gated product count.
        cluster: programs that share weights, 1 or 2; so many tiles are neighbours by their rows.
        band: clusters of rows that are walked through together.
        slots: blocks of 64 inputs in flight.
    """

    tile_n: int
    cluster: int
    band: int = 8
    slots: int = 4

    @property
    def normalises(self) -> bool:
        """Whether the kernel normalises its rows itself: it does not."""
        return False

    @property
    def out_columns(self) -> int:
        """Outputs of a tile that are written at once."""
        return 64 if self.tile_n % 64 == 0 else self.tile_n

    def takes(self, m: int, n: int, k: int) -> bool:
        """Whether the kernel can run with these sizes."""
        rows = m % 8 == 0 and m >= 128 and m > 128 * (self.cluster - 1)
        return rows and n % self.tile_n == 0 and k % 64 == 0 and k >= 64 * self.slots


MIN_DOT = 16
"""The least extent of a Triton dot in any direction."""

MANY = 1 << 30
"""More rows than any product has."""

Rows = Mapping[int, Config | Wide | None]
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
            2048: None,
            MANY: Wide(tile_n=256, cluster=2),
        },
        (4096, 4096, False): {
            1: Config(16, 1, 1024, 1, 8, 1),
            16: Config(64, 16, 256, 1, 4, 4),
            32: Config(64, 32, 128, 1, 4, 6),
            64: Config(64, 64, 128, 1, 4, 6),
            128: Config(64, 64, 128, 1, 4, 4),
            256: Config(64, 128, 64, 1, 4, 6),
            2048: None,
            MANY: Wide(tile_n=256, cluster=2),
        },
        (14336, 4096, True): {
            1: Config(4, 1, 1024, 1, 4, 1),
            16: Config(128, 16, 128, 1, 8, 3, normalises=False),
            32: Config(128, 32, 128, 1, 8, 3),
            64: None,
            96: Config(64, 128, 128, 1, 4, 3, normalises=False),
            128: Wide(tile_n=112, cluster=1),
            512: Wide(tile_n=112, cluster=2),
            MANY: Wide(tile_n=128, cluster=2),
        },
        (4096, 14336, False): {
            16: Config(32, 16, 512, 1, 4, 4),
            32: Config(64, 32, 128, 1, 4, 6),
            64: Config(128, 64, 128, 3, 8, 4),
            128: Config(64, 128, 64, 2, 4, 6),
            2048: None,
            MANY: Wide(tile_n=256, cluster=2),
        },
    },
}
"""From a part of the device's name, by (n, k, gated) and the most rows, to what was fastest; None is XLA."""


def choose(device_kind: str, m: int, n: int, k: int, gated: bool) -> Config | Wide | None:
    """The fastest configuration known for m rows; None for XLA, which also takes every shape that nobody measured."""
    for name, shapes in MEASURED.items():
        if name in device_kind:
            rows = shapes.get((n, k, gated), {})
            bucket = min((most for most in rows if most >= m), default=None)
            return None if bucket is None else rows[bucket]
    return None
