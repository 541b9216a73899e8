"""Block sizes of the attention kernels, by rules that were measured on an H100 where they say so."""

from dataclasses import dataclass

from jax.experimental import pallas as pl


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel divides a row's context.

    Attributes:
        block: keys read at once.
        splits: programs that may divide one head of a row among them.
        min_share: the fewest keys that a split reads, so that a short context is not divided.
        num_warps: warps per program.
        num_stages: blocks read ahead.
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
        tile_tokens: consecutive tokens of a row that a program handles, with all query heads of a key-value head.
        block: keys read at once.
        num_warps: warps per program.
        num_stages: blocks read ahead.
    """

    tile_tokens: int
    block: int
    num_warps: int
    num_stages: int


FILLING_PROGRAMS = 256
"""How many programs keep the memory of a GPU with 132 multiprocessors busy."""

UNDIVIDED = 512
"""The longest context that one program reads faster than several programs whose results another one combines."""


def decode_config(rows: int, kv_heads: int, head_dim: int, itemsize: int, longest: int) -> DecodeConfig:
    """The configuration for a batch of rows of at most `longest` tokens; fewer rows have more splits.

    With the heads of Llama 3 an H100 reaches 94 % of its read bandwidth at 32 rows of 4,096 tokens, and 97 % at 64 rows
    of 8,192.
    """
    splits = 1
    while longest > UNDIVIDED and splits < 16 and rows * kv_heads * splits < FILLING_PROGRAMS:
        splits *= 2
    block = _block(head_dim, itemsize)
    if rows * kv_heads < 2 * FILLING_PROGRAMS:
        # So few programs are bound by the latency of their own reads, so these are fewer and larger.
        block = 2 * block
    return DecodeConfig(block, splits, min_share=256, num_warps=4, num_stages=2)


HOPPER_TOKENS = 1024
"""The tokens of a step from which the kernel for Hopper is used, where it supports the arguments."""

LONG_STEP = 2048
"""The tokens of a step from which its prompts are long enough to fill tiles of 128 query rows."""


def ragged_config(tokens: int, group: int, head_dim: int, itemsize: int) -> RaggedConfig:
    """The configuration for a step: tiles of 128 or 64 query rows, and fewer for heads of many bytes."""
    entry = pl.next_power_of_2(head_dim) * itemsize
    rows = (128 if tokens >= LONG_STEP else 64) if entry <= 256 else 64 if entry <= 512 else 32
    tile_tokens = rows // pl.next_power_of_2(group)
    return RaggedConfig(max(tile_tokens, 1), _block(head_dim, itemsize), 4, 2)


def _block(head_dim: int, itemsize: int) -> int:
    """How many keys take 16 KiB, but from 16 to 64."""
    return max(16, min(64, 64 * 256 // (pl.next_power_of_2(head_dim) * itemsize)))
