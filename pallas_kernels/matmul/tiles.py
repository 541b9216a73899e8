"""How the matmul kernels divide a product into tiles: the records that describe it."""

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
        tile_n: outputs of a tile, a divisor of n and a multiple of 16; a tile of a gated product has as many for each
            of its two factors.
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
        return rows and n % self.tile_n == 0 and self.tile_n % 16 == 0 and k % 64 == 0 and k >= 64 * self.slots


MIN_DOT = 16
"""The smallest size of any axis of a Triton dot."""
