"""The time of each kernel in a step of Llama-3.1-8B, without an engine: a few layers and the head on one GPU.

    python benchmarks/layers.py [--rows 1 8 128 256] [--tokens 128 4096] [--layers 8] [--try down:128=xla ...]

Decode steps of `--rows` rows at a context of 256, and prompts of `--tokens` tokens. `--try SHAPE:ROWS=CONFIG` repeats
the decode step of ROWS rows with another entry of the matmul table: `xla`, or the fields of a `Config` separated by
commas, as in `--try gate_up:128=64,128,128,1,4,3,0`. Prints one JSON line for each step: microseconds by the host's
clock with steps queued back to back, by the device's clock for all kernels, and for each kernel with its run count.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shapes import LLAMA_8B

from pallas_kernels import sampling
from pallas_kernels.attention import cache_shape
from pallas_kernels.matmul import Config, tuned
from trtllm_jax.commands.bench.trace import newest_trace, read_kernels
from trtllm_jax.engine import device_memory
from trtllm_jax.models import llama
from trtllm_jax.nn import forward
from trtllm_jax.nn.batch import Batch, RaggedRows

SHAPES = {
    "qkv": (6144, 4096, False), "o": (4096, 4096, False), "gate_up": (14336, 4096, True), "down": (4096, 14336, False),
}  # fmt: skip
CONTEXT, PAGE, TABLE_WIDTH = 256, 32, 144
Table = Mapping[str, Mapping[tuple[int, int, bool], tuned.Rows]]


@dataclass(frozen=True)
class Case:
    """One step: `rows` decoding rows, or one prompt of `tokens` tokens."""

    name: str
    batch: Batch
    pages: int
    table: Table


def decode_case(rows: int, table: Table, name: str = "") -> Case:
    """Rows whose newest token is the last of the context."""
    pages = CONTEXT // PAGE
    page_table = np.zeros((rows, TABLE_WIDTH), np.int32)
    held = np.random.default_rng(0).permutation(np.arange(1, 1 + rows * pages)).reshape(rows, pages)
    page_table[:, :pages] = held
    positions = np.full(rows, CONTEXT - 1, np.int32)
    tokens, active = jnp.arange(rows, dtype=jnp.int32), jnp.ones(rows, bool)
    batch = Batch.of_decoding_rows(tokens, jnp.asarray(positions), active, (jnp.asarray(page_table),), PAGE)
    return Case(name or f"decode {rows}", batch, 1 + rows * pages, table)


def prompt_case(tokens: int) -> Case:
    """The batch of one prompt's prefill; the other rows are padding."""
    rows, pages = min(tokens, 256), -(-tokens // PAGE)
    page_table = np.zeros((rows, TABLE_WIDTH), np.int32)
    page_table[0, :pages] = np.arange(1, 1 + pages)
    counts = jnp.array([tokens] + [0] * (rows - 1), jnp.int32)
    ragged = RaggedRows.of(tokens, jnp.array([0] + [tokens] * rows, jnp.int32), jnp.zeros_like(counts), counts > 0)
    ids = jnp.arange(tokens, dtype=jnp.int32)
    batch = Batch.of_ragged_rows(ids, ragged, (jnp.asarray(page_table),), counts, PAGE)
    return Case(f"prompt {tokens}", batch, 1 + pages, tuned.MEASURED)


def tried_case(text: str) -> Case:
    """The case of a `--try`."""
    where, _, entry = text.partition("=")
    shape, _, rows = where.partition(":")
    fields = [] if entry == "xla" else [int(field) for field in entry.split(",")]
    config = Config(*fields[:6], *map(bool, fields[6:])) if fields else None
    first = {jax.devices()[0].device_kind: {SHAPES[shape]: {int(rows): config}}}
    return decode_case(int(rows), first | tuned.MEASURED, f"decode {rows}, {where} {entry}")


def random_params(layers: int) -> dict[str, Any]:
    """Weights of a size that keeps activations finite."""

    def draw(index: int, *shape: int) -> jax.Array:
        return jax.jit(lambda: jax.random.normal(jax.random.key(index), shape, jnp.bfloat16) * 0.02)()

    ones = jnp.ones(4096, jnp.bfloat16)
    return {
        "embed": draw(0, 128256, 4096), "head": draw(1, 128256, 4096), "norm": ones,
        "layers": tuple(
            {
                "attn_norm": ones, "mlp_norm": ones, "qkv": draw(4 * i + 2, 8, 6, 128, 4096),
                "o": draw(4 * i + 3, 4096, 8, 4, 128), "gate_up": draw(4 * i + 4, 2, 14336, 4096),
                "down": draw(4 * i + 5, 4096, 14336),
            }
            for i in range(layers)
        ),
    }  # fmt: skip


def step(config: llama.Config, params: Any, caches: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """Greedy tokens and the caches."""
    x, caches = forward.hidden_states(llama, config, params, batch, caches)
    (locations,) = batch.groups
    if locations.starts is not None:
        x = x[jnp.maximum(locations.starts[1:] - 1, 0)]
    return sampling.greedy(llama.head(config, params, x)), caches


def lowered(case: Case, config: llama.Config, params: Any) -> tuple[jax.stages.Lowered, Any]:
    """The step with the case's matmul table, and the shapes of its caches."""
    tuned.MEASURED = case.table  # type: ignore[assignment]
    forward._traced_once.cache_clear()
    jax.clear_caches()
    caches = (jax.ShapeDtypeStruct(cache_shape(case.pages, 8, PAGE, 128), jnp.bfloat16),) * config.num_layers
    return jax.jit(partial(step, config), donate_argnums=1).lower(params, caches, case.batch), caches


def measure(name: str, program: Any, params: Any, caches: Any, batch: Batch, repeats: int = 20) -> None:
    """Time one program and print its line."""
    batch = jax.device_put(batch)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(repeats):
            tokens, caches = program(params, caches, batch)
        tokens.block_until_ready()
        seconds.append((time.perf_counter() - started) / repeats)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            tokens, caches = program(params, caches, batch)
            tokens.block_until_ready()
        kernels = read_kernels(newest_trace(Path(folder)))
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append(kernel.self_us)
    longest = sorted(times, key=lambda kernel: -sum(times[kernel]))[:12]
    shown = {kernel[:48]: f"{len(times[kernel])} x {sum(times[kernel]) / len(times[kernel]):.1f}" for kernel in longest}
    busy = sum(map(sum, times.values()))
    print(json.dumps({"step": name, "us": round(min(seconds) * 1e6), "kernels_us": round(busy), **shown}), flush=True)


def main() -> None:
    """Lower everything, compile it at once, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 128, 256])
    parser.add_argument("--tokens", nargs="*", type=int, default=[128, 4096])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--try", dest="tried", nargs="*", default=[], metavar="SHAPE:ROWS=CONFIG")
    args = parser.parse_args()
    device_memory.claim()
    config = replace(llama.Config.from_hf(LLAMA_8B), num_layers=args.layers)
    params = random_params(args.layers)
    cases = [decode_case(rows, tuned.MEASURED) for rows in args.rows]
    cases += [*map(tried_case, args.tried), *map(prompt_case, args.tokens)]
    steps = [lowered(case, config, params) for case in cases]
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda each: each[0].compile(), steps))
    for case, program, (_, shapes) in zip(cases, compiled, steps, strict=True):
        measure(case.name, program, params, tuple(jnp.zeros(s.shape, s.dtype) for s in shapes), case.batch)


if __name__ == "__main__":
    main()
