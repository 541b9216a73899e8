"""Block sizes of the attention kernels: data, measured on an H100 where it says so."""

from dataclasses import dataclass

from jax.experimental import pallas as pl


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel divides a row's context.

    Attributes:
        block: keys read at once.
        splits: programs that may share one head of a row.
        min_share: keys that a split reads at least, so that a short context is not divided.
        num_warps: warps of a program.
        num_stages: blocks in flight.
    """

    block: int
    splits: int
    min_share: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RaggedConfig:
    """How the ragged kernel divides a batch.

    Attributes:
        tile_tokens: a row's tokens handled together, times its query heads of a key-value head.
        block: keys read at once.
        num_warps: warps of a program.
        num_stages: blocks in flight.
    """

    tile_tokens: int
    block: int
    num_warps: int
    num_stages: int


FILLING_PROGRAMS = 256
"""Programs that keep the memory of a GPU of 132 multiprocessors busy."""

UNDIVIDED = 512
"""The longest context that one program reads faster than several do and another combines."""


def decode_config(rows: int, kv_heads: int, head_dim: int, itemsize: int, longest: int) -> DecodeConfig:
    """The configuration for a batch of rows of at most `longest` tokens: the fewer rows, the more splits.

    On an H100 at Llama 3's heads: 94 % of the read bandwidth at 32 rows of 4,096 tokens, 97 % at 64 of 8,192.
    """
    splits = 1
    while longest > UNDIVIDED and splits < 16 and rows * kv_heads * splits < FILLING_PROGRAMS:
        splits *= 2
    block = _block(head_dim, itemsize)
    if rows * kv_heads < 2 * FILLING_PROGRAMS:
        # What a program waits for then is its own reads, one after the other: fewer and larger ones.
        block = 2 * block
    return DecodeConfig(block, splits, min_share=256, num_warps=4, num_stages=2)


HOPPER_TOKENS = 1024
"""Tokens of a step from which on Hopper's own kernel attends, where it can."""

LONG_STEP = 2048
"""Tokens of a step from which on its prompts are long enough to fill tiles of 128 query rows."""


def ragged_config(tokens: int, group: int, head_dim: int, itemsize: int) -> RaggedConfig:
    """The configuration for a step: tiles of 128 or 64 query rows, fewer where head_dim and dtype leave less room."""
    entry = pl.next_power_of_2(head_dim) * itemsize
    rows = (128 if tokens >= LONG_STEP else 64) if entry <= 256 else 64 if entry <= 512 else 32
    tile_tokens = rows // pl.next_power_of_2(group)
    return RaggedConfig(max(tile_tokens, 1), _block(head_dim, itemsize), 4, 2)


def _block(head_dim: int, itemsize: int) -> int:
    """Keys of which a block takes 16 KiB, between 16 and 64."""
    return max(16, min(64, 64 * 256 // (pl.next_power_of_2(head_dim) * itemsize)))
