"""The engine's configuration: sizes, memory, policy. The public API resolves its arguments to this record."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from pallas_kernels.devices import Platform
from trtllm_jax.engine.limits import CapacityPolicy


class Compilation(enum.Enum):
    """When the programs of an engine are compiled."""

    BEFORE = "before"
    """Before the first request: none waits for the compiler."""
    BESIDE = "beside"
    """Those that the smallest request needs before the first request, the others in a thread while requests run."""
    WHEN_NEEDED = "when needed"
    """Each when a request needs it."""


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings; None means the engine chooses.

    Attributes:
        max_batch_size: sequences that run at once, at most.
        max_num_tokens: tokens of one ragged step, at most.
        max_seq_len: tokens of a sequence, at most.
        page_size: tokens of a KV page.
        kv_tokens: tokens of the KV pool.
        kv_fraction: part of the free device memory that the KV pool takes.
        kv_dtype: name of the pool's dtype.
        reuse: whether finished prefixes are kept for later prompts.
        policy: when a sequence is admitted.
        max_decode_steps: tokens a row may gain in one dispatch.
        overlap_scheduling: whether a step is dispatched before the one before it was read.
        batched_processor: called once a step for the sequences that ask for it.
        event_buffer: cache events kept for `get_kv_cache_events`; 0 keeps none.
        stats_length: iteration statistics kept for `get_stats`.
        eager: whether programs are compiled when they are needed, and not before.
    """

    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    page_size: int = 32
    kv_tokens: int | None = None
    kv_fraction: float = 0.9
    kv_dtype: str | None = None
    reuse: bool = True
    policy: CapacityPolicy = CapacityPolicy.GUARANTEED_NO_EVICT
    max_decode_steps: int | None = None
    overlap_scheduling: bool = True
    batched_processor: Callable[..., object] | None = None
    event_buffer: int = 0
    stats_length: int = 1000
    eager: bool = False


@dataclass(frozen=True)
class BackendDefaults:
    """Sizes that suit a kind of device where the user names none."""

    max_batch_size: int
    max_num_tokens: int
    max_decode_steps: int


def backend_defaults(platform: Platform) -> BackendDefaults:
    """A CPU core computes a few hundred tokens a second: larger steps only delay everyone, and cost compile time.

    It saves host work by several tokens a dispatch; a GPU is kept busy by the next dispatch being queued already, and
    a new request then waits for one token only.
    """
    return BackendDefaults(32, 512, 8) if platform.on_cpu else BackendDefaults(256, 8192, 1)


def compilation(eager: bool, platform: Platform) -> Compilation:
    """When to compile. A GPU's compiler measures on the device, and needs memory there that the cache will take."""
    if eager:
        return Compilation.WHEN_NEEDED
    return Compilation.BESIDE if platform.on_cpu else Compilation.BEFORE


def decode_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Row counts that a decode loop is compiled for: powers of two, and from 16 on some between."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, *range(256, 2048, 256), 2048, 3072, 4096, 6144, 8192, 12288]
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


def extras_buckets(decode: tuple[int, ...]) -> tuple[int, ...]:
    """Those of these that programs with extras of their own are compiled for: fewer, because there are two of each."""
    return tuple(size for size in decode if size == decode[-1] or size in (8, 32, 64, 128, 256))


def encode_widths(max_seq_len: int) -> tuple[int, ...]:
    """Lengths that steps of whole sequences are compiled for: powers of two from 16 on, and the longest."""
    sizes = [1 << power for power in range(4, 31)]
    return (*(size for size in sizes if size < max_seq_len), max_seq_len)


def encode_rows(most: int) -> tuple[int, ...]:
    """Sequences that such steps are compiled for: powers of four, and the most."""
    sizes = [1 << power for power in range(0, 16, 2)]
    return (*(size for size in sizes if size < most), most)


def token_buckets(max_num_tokens: int, platform: Platform) -> tuple[int, ...]:
    """Token counts that a ragged step is compiled for, up to the maximum.

    A CPU's are powers of four. A GPU's are close together from 128 on, where a step's time grows with its tokens.
    """
    if platform.on_cpu:
        sizes = [16, 64, 256, 1024, 4096]
    else:
        sizes = [16, 64, 128, 256, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 6144]
    return (*(size for size in sizes if size < max_num_tokens), max_num_tokens)
