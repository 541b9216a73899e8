"""Tile sizes of the matmul kernels, as a table of measured choices."""

from collections.abc import Mapping
from typing import NamedTuple


class Config(NamedTuple):
    """How the kernel for few rows divides a product of x [m, k] and w [n, k]; tile sizes are powers of two.

    Attributes:
        block_n: outputs per program; at least 16 with tensor cores.
        block_m: rows per program. Below 16 the kernel multiplies row by row, without tensor cores.
        block_k: inputs read at once, a divisor of k; at least 16 with tensor cores.
        splits: programs that divide the inputs of one tile among them; their sums are added outside the kernel.
        num_warps: warps per program.
        num_stages: blocks read ahead; at most one without tensor cores.
        normalises: whether the kernel also normalises the rows, which saves a kernel but is repeated by every program.
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
        """Whether there are enough rows per program for the tensor cores."""
        return self.block_m >= MIN_DOT

    def takes(self, m: int, n: int, k: int) -> bool:
        """Whether the kernel supports a product of these sizes."""
        return k % self.block_k == 0 and self.splits <= k // self.block_k


class Wide(NamedTuple):
    """How the kernel for many rows divides a product of x [m, k] and w [n, k] into tiles of 128 rows.

    Attributes:
        tile_n: outputs of a tile, a divisor of n; a tile of a gated product has as many for each of its two factors.
        cluster: programs, 1 or 2, that work on neighbouring rows and share the weights they read.
        band: rows of clusters that are computed before the next ones, so that the L2 cache holds their operands.
        slots: blocks of 64 inputs in shared memory.
    """

    tile_n: int
    cluster: int
    band: int = 8
    slots: int = 4

    @property
    def normalises(self) -> bool:
        """Whether the kernel also normalises the rows, which it does not."""
        return False

    @property
    def out_columns(self) -> int:
        """How many outputs of a tile are written at once."""
        return 64 if self.tile_n % 64 == 0 else self.tile_n

    def takes(self, m: int, n: int, k: int) -> bool:
        """Whether the kernel supports a product of these sizes."""
        rows = m % 8 == 0 and m >= 128 and m > 128 * (self.cluster - 1)
        return rows and n % self.tile_n == 0 and k % 64 == 0 and k >= 64 * self.slots


MIN_DOT = 16
"""The smallest size of any axis of a Triton dot."""

MANY = 1 << 30
"""A number of rows that no product reaches."""

Rows = Mapping[int, Config | Wide | None]
"""Choices by the largest number of rows that each applies to; None stands for XLA."""

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
"""The fastest choices by a part of the device's name and by (n, k, gated)."""


def choose(device_kind: str, m: int, n: int, k: int, gated: bool) -> Config | Wide | None:
    """The fastest configuration measured for m rows; None for XLA, which also takes shapes that were not measured."""
    for name, shapes in MEASURED.items():
        if name in device_kind:
            rows = shapes.get((n, k, gated), {})
            bucket = min((most for most in rows if most >= m), default=None)
            return None if bucket is None else rows[bucket]
    return None
