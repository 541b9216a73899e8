"""Attention kernels on a GPU: checked against the XLA reference, then timed over a sweep of block sizes.

    python benchmarks/attention.py [--cases decode prefill mixed] [--quick]

Llama-3.1-8B's heads (32 query heads, 8 key-value heads of 128) in bfloat16, pages of 32. One JSON line a result:
microseconds a call, and the share of 3.14 TB/s of cache read (decode) or TFLOP/s of the causal half (prefill).
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_clock import device_microseconds

from pallas_kernels.attention import PageLocations, Rotation, Scoring, cache_shape, xla
from pallas_kernels.attention.pallas_decode import decode_attention
from pallas_kernels.attention.pallas_ragged import ragged_attention
from pallas_kernels.attention.tuned import DecodeConfig, RaggedConfig

KV, GROUP, DIM, PAGE = 8, 4, 128, 32
SCORING = Scoring(DIM**-0.5)
READ_BYTES_PER_US = 3.14e6
TURNS = 7


@dataclass(frozen=True)
class Batch:
    """The inputs of attention for rows of (cached, new) tokens, without qkv and the caches."""

    page: np.ndarray
    offset: np.ndarray
    page_table: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    pages: int

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int]]) -> "Batch":
        """A batch over pages in random order."""
        rng = np.random.default_rng(0)
        lengths = np.array([sum(row) for row in rows], np.int32)
        starts = np.cumsum([0, *(new for _, new in rows)]).astype(np.int32)
        held = -(-lengths // PAGE)
        pages = 1 + int(held.sum())
        table = np.zeros((len(rows), held.max()), np.int32)
        free = rng.permutation(np.arange(1, pages))
        for row, (first, count) in enumerate(zip(np.cumsum([0, *held[:-1]]), held, strict=True)):
            table[row, :count] = free[first : first + count]
        row = np.repeat(np.arange(len(rows)), np.diff(starts))
        positions = (np.arange(starts[-1]) - starts[row] + lengths[row] - np.diff(starts)[row]).astype(np.int32)
        return cls(table[row, positions // PAGE], positions % PAGE, table, lengths, starts, positions, pages)

    @property
    def rotation(self) -> Rotation:
        """Of every token."""
        angles = self.positions[:, None] * (500000.0 ** -(np.arange(0, DIM, 2) / DIM))
        return Rotation(jnp.cos(angles).astype(jnp.float32), jnp.sin(angles).astype(jnp.float32))


def random_inputs(batch: Batch, caches: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    keys = jax.random.split(jax.random.key(1), 1 + caches)
    qkv = jax.random.normal(keys[0], (len(batch.positions), KV, GROUP + 2, DIM), jnp.bfloat16)
    shape = cache_shape(batch.pages, KV, PAGE, DIM)
    return qkv, tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])


Places = tuple[PageLocations, Rotation]
"""Arguments, because XLA would fold constants."""


def places_of(batch: Batch) -> Places:
    arrays = (batch.page, batch.offset, batch.page_table, batch.lengths, batch.starts)
    return PageLocations(*map(jnp.asarray, arrays)), batch.rotation


def attend(config: DecodeConfig | RaggedConfig | str) -> Callable[..., Any]:
    """A function of (qkv, cache, places); without a config the reference for "decode" or "ragged"."""

    def run(qkv: jax.Array, cache: jax.Array, places: Places) -> tuple[jax.Array, jax.Array]:
        locations, rotation = places
        if config == "decode" or isinstance(config, DecodeConfig):
            locations = replace(locations, starts=None)
        named: dict[str, Any] = {"scoring": SCORING, "rotation": rotation, "sinks": None, "slopes": None}
        if isinstance(config, str):
            return xla.append_and_attend(qkv, cache, locations, **named)
        named["norms"] = None
        if isinstance(config, DecodeConfig):
            return decode_attention(qkv, cache, locations, config=config, **named)
        return ragged_attention(qkv, cache, locations, config=config, **named)

    return run


def causal_by_cudnn(batch: Batch) -> Any:
    """A compiled call of cuDNN on contiguous heads, for prompts of one length."""
    length, rows = int(batch.lengths[0]), len(batch.lengths)
    shapes = [jax.ShapeDtypeStruct((rows, length, heads, DIM), jnp.bfloat16) for heads in (KV * GROUP, KV, KV)]
    call = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return jax.jit(call).lower(*shapes).compile(), shapes


def error(batch: Batch, config: DecodeConfig | RaggedConfig) -> float:
    """Relative error against the reference, of the attention and of the cache."""
    qkv, (cache,) = random_inputs(batch, 1)
    reference = "decode" if isinstance(config, DecodeConfig) else "ragged"
    expected, kept = jax.jit(attend(reference))(qkv, cache, places_of(batch))
    out, written = jax.jit(attend(config))(qkv, cache, places_of(batch))
    difference = jnp.linalg.norm((out - expected).astype(jnp.float32)) / jnp.linalg.norm(expected.astype(jnp.float32))
    changed = jnp.max(jnp.abs(written.astype(jnp.float32) - kept.astype(jnp.float32))[1:])
    return float(jnp.where(changed <= 0.05, difference, jnp.inf))


def compiled(batch: Batch, config: DecodeConfig | RaggedConfig) -> Any:
    qkv, (cache,) = jax.eval_shape(lambda: random_inputs(batch, 1))
    places = jax.eval_shape(lambda: places_of(batch))
    return jax.jit(attend(config), donate_argnums=1).lower(qkv, cache, places).compile()


def decode_configs(rows: int, quick: bool) -> Iterator[DecodeConfig]:
    """Sizes to try: more splits for fewer rows."""
    splits = [1, 2] if rows * KV >= 264 else [1, 4, 8, 16] if rows * KV >= 64 else [1, 8, 16, 32]
    blocks = [(64, 4, 3), (32, 4, 4), (128, 4, 2), (64, 2, 3), (32, 2, 4), (64, 4, 2), (128, 8, 2)]
    for split, (block, warps, stages) in itertools.product(splits, blocks[:4] if quick else blocks):
        yield DecodeConfig(block, split, 256, warps, stages)


def ragged_configs(quick: bool) -> Iterator[RaggedConfig]:
    sizes = [(32, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 3), (32, 32, 4, 2), (16, 64, 4, 3), (16, 64, 4, 2),
             (16, 32, 4, 2), (32, 128, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (16, 128, 4, 2)]  # fmt: skip
    for size in sizes[:6] if quick else sizes:
        yield RaggedConfig(*size)


DECODE = [(1, 256), (1, 4096), (32, 256), (128, 256), (32, 4096), (16, 8192), (64, 8192)]
RAGGED = {
    "prefill 1x128": [(0, 128)],
    "prefill 1x1024": [(0, 1024)],
    "prefill 1x4096": [(0, 4096)],
    "prefill 2x4096": [(0, 4096)] * 2,
    "chunk 64 behind 4032": [(4032, 64)],
    "mixed 60 decoding + 1024": [(300, 1)] * 60 + [(0, 1024)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["decode", "ragged"])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    jobs: list[tuple[str, Batch, list[Any], int]] = []
    if "decode" in args.cases:
        check = Batch.of([(length, 1) for length in (0, 5, 31, 32, 300, 1000, 2000)])
        for config in itertools.islice(decode_configs(1, True), 2):
            print(json.dumps({"check": str(config), "error": error(check, config)}), flush=True)
        for rows, context in DECODE:
            batch = Batch.of([(context - 1, 1)] * rows)
            jobs.append((f"decode {rows}x{context}", batch, list(decode_configs(rows, args.quick)), 0))
    if "ragged" in args.cases:
        check = Batch.of([(0, 70), (300, 1), (100, 33), (40, 1), (0, 5), (1000, 200)])
        for config in itertools.islice(ragged_configs(True), 2):
            print(json.dumps({"check": str(config), "error": error(check, config)}), flush=True)
        for name, rows in RAGGED.items():
            operations = sum(4 * KV * GROUP * DIM * (new * cached + new * new // 2) for cached, new in rows)
            jobs.append((name, Batch.of(rows), list(ragged_configs(args.quick)), operations))
    with ThreadPoolExecutor(16) as pool:
        futures = [[pool.submit(compiled, batch, config) for config in configs] for _, batch, configs, _ in jobs]
        wait(list(itertools.chain(*futures)))  # what compiles would slow what is measured
    for (name, batch, configs, operations), waiting in zip(jobs, futures, strict=True):
        qkv, caches = random_inputs(batch, _caches(batch))
        places = places_of(batch)
        calls: list[Callable[[], Any]] = []
        labels: list[Any] = []

        def call(function: Any, turn: int, caches: list[jax.Array] = list(caches)) -> jax.Array:  # noqa: B006
            out, caches[turn % len(caches)] = function(qkv, caches[turn % len(caches)], places)  # noqa: B023
            return out

        for config, future in zip(configs, waiting, strict=True):
            if failure := future.exception():
                print(json.dumps({"case": name, "config": str(config), "failed": str(failure)[:150]}), flush=True)
                continue
            call(future.result(), 0)
            labels += [list(vars(config).values())] * TURNS
            calls += [partial(call, future.result(), turn) for turn in range(TURNS)]
        if (
            operations
            and len(set(batch.lengths)) == 1
            and batch.lengths[0] * len(batch.lengths) == len(batch.positions)
        ):
            function, shapes = causal_by_cudnn(batch)
            inputs = [jax.random.normal(jax.random.key(2), each.shape, each.dtype) for each in shapes]
            function(*inputs)
            labels += ["cuDNN"] * TURNS
            calls += [partial(function, *inputs)] * TURNS
        try:
            taken = device_microseconds(calls)
        except ValueError as failure:
            print(json.dumps({"case": name, "failed": str(failure)}), flush=True)
            continue
        for first in range(0, len(calls), TURNS):
            us = statistics.median(taken[first : first + TURNS])
            read = int(batch.lengths.sum()) * 2 * KV * DIM * 2
            share = {"tflops": operations / us / 1e6} if operations else {"of_read": read / us / READ_BYTES_PER_US}
            record = {"case": name, "us": round(us, 1), **{key: round(value, 3) for key, value in share.items()}}
            print(json.dumps(record | {"config": labels[first]}), flush=True)


def _caches(batch: Batch) -> int:
    """Enough to overflow the L2 cache, few enough for the memory."""
    each = batch.pages * PAGE * 2 * KV * DIM * 2
    return int(np.clip(200e6 // each, 2, TURNS))


if __name__ == "__main__":
    main()
