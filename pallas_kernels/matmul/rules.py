"""Tile sizes for products of few rows on a Hopper GPU, from the shapes alone.

Such a product takes as long as reading its weights where three things hold: the programs are as many as the
multiprocessors, or a multiple, so that none waits at the end for others; each has 128 to 200 KB on the way; and no
weight is read twice from memory. Where they cannot hold, XLA's library is faster. A sweep over four models on an H200
led to the numbers; `docs/performance.md` has it, and a test compares each choice with the sweep's best.
"""

import math
from collections.abc import Iterator

from pallas_kernels.matmul.tiles import MIN_DOT, Config, Wide

SHARED_BYTES = 200 * 1024
"""Shared memory that the blocks of a program may take; a multiprocessor has 227 KB."""

L2_BYTES = 50 * 10**6
"""The L2 cache: weights up to this size may be read by two programs at the cost of one."""

MOST_ROWS = 128
"""Rows up to which the rules were measured."""

SMALL_WEIGHT_BYTES = 52 * 10**6
"""The size of a weight up to which one row is computed faster without tensor cores."""

LARGE_WEIGHT_BYTES = 100 * 10**6
"""The size of a weight from which XLA is faster at one row, and for two weights at once at up to 16 rows."""

SPLIT_COST = 0.02
"""What dividing the inputs among one more program costs, as a part of the time."""

LARGE_TILE_COST = 0.03
"""What tiles of 128 outputs cost where tiles of 64 fill as many multiprocessors."""

LEAST_BUSY = 0.7
"""The part of the multiprocessors that must have work, or XLA is faster; more of them for two weights at once."""
LEAST_BUSY_GATED = 0.8


def choose(multiprocessors: int, m: int, n: int, k: int, gated: bool) -> Config | Wide | None:
    """The tile sizes for x [m, k] times w [n, k], or [2, n, k] of a gated product; None for XLA."""
    planes = 2 if gated else 1
    weight_bytes = 2 * planes * n * k
    if weight_bytes > LARGE_WEIGHT_BYTES and (m == 1 or (gated and m <= MIN_DOT)):
        return None
    if m == 1 and k % 1024 == 0 and weight_bytes <= SMALL_WEIGHT_BYTES:
        few_programs = n // 4 < 6 * multiprocessors
        return Config(4, 1, 1024, 1, 8 if few_programs else 4, 1)
    if m > MOST_ROWS or (gated and 32 < m < MOST_ROWS):
        return None
    if gated and m == MOST_ROWS:
        return _wide(multiprocessors, n, k)
    return _few_rows(multiprocessors, m, n, k, planes)


def busy(multiprocessors: int, programs: int) -> float:
    """The part of the multiprocessors that have work, on average, if programs of equal length run in waves."""
    return programs / (multiprocessors * math.ceil(programs / multiprocessors))


def _few_rows(multiprocessors: int, m: int, n: int, k: int, planes: int) -> Config | None:
    """The tiles that keep the multiprocessors busiest, costs of splits and of larger tiles considered."""
    best, best_worth = None, LEAST_BUSY_GATED if planes == 2 else LEAST_BUSY
    for config in _candidates(m, n, k, planes):
        programs = math.ceil(m / config.block_m) * math.ceil(n / config.block_n) * config.splits
        waves = math.ceil(programs / multiprocessors)
        if waves > 2 or (config.splits > 1 and waves > 1):
            continue
        worth = busy(multiprocessors, programs) - SPLIT_COST * (config.splits - 1)
        worth -= LARGE_TILE_COST * (config.block_n > 64)
        if worth >= best_worth and (best is None or worth > best_worth):
            best, best_worth = config, worth
    return best


def _candidates(m: int, n: int, k: int, planes: int) -> Iterator[Config]:
    """Tiles in the order of preference: all rows at once, few splits."""
    rows = max(MIN_DOT, 1 << (m - 1).bit_length())
    read_twice = 2 * planes * n * k > L2_BYTES
    for block_m in (rows,) if rows <= 64 or read_twice else (rows, rows // 2):
        for block_n in (64, 128) if planes == 1 and block_m <= 32 else (64,):
            for splits in (1, 2, 3, 4, 8) if planes == 1 else (1,):
                if depth := _depth(block_m, block_n, k, planes, splits):
                    yield Config(block_n, block_m, depth[0], splits, 4, depth[1], normalises=False)


def _depth(block_m: int, block_n: int, k: int, planes: int, splits: int) -> tuple[int, int] | None:
    """How many inputs a block has, and how many blocks are read ahead; None if shared memory or k do not allow it."""
    for block_k in (256, 128):
        most = 6 if (block_k, planes * block_n) == (128, 64) else 4
        stages = min(most, SHARED_BYTES // (2 * block_k * (planes * block_n + block_m)), k // block_k // splits)
        if k % block_k == 0 and stages >= 4:
            return block_k, stages
    return None


def _wide(multiprocessors: int, n: int, k: int) -> Wide | None:
    """The tiles of the kernel for many rows that keep the multiprocessors busiest, the larger of equal ones."""
    tiles = [Wide(tile_n, cluster=1) for tile_n in range(64, 144, 16)]
    fitting = [tile for tile in tiles if tile.takes(MOST_ROWS, n, k)]
    best = max(fitting, key=lambda tile: (busy(multiprocessors, n // tile.tile_n), tile.tile_n), default=None)
    return best if best and busy(multiprocessors, n // best.tile_n) >= LEAST_BUSY_GATED else None
