"""The matmul kernel against XLA on Llama-3.1-8B's shapes: configurations are checked and timed on one GPU.

    python benchmarks/matmul.py [--shapes qkv,o,gate_up,down,head] [--rows 1,8,16,32,64,128,256] [--configs 24]
                                [--quick]

Prints one JSON line for each result: microseconds a product, the bandwidth of reading the weights once in percent of
the copy bandwidth, TFLOP/s and the relative error against float32. Each shape is swept as `linear` (gate_up as
`gated_linear`); the three best configurations are then timed with a normalisation and with a residual. The last line
has the table for `pallas_kernels/matmul/tuned.py`. A timed program multiplies by several copies of the weights in turn,
which together exceed the L2 cache, in an order that barriers fix.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul import Config, gated_linear, linear
from pallas_kernels.norm import Norm

COPY_BYTES_PER_US = 2.93e6
L2_BYTES_PER_US = 5.5e6
FLOP_PER_US = 6e8
SMS = 132
SHARED_BYTES = 227 * 1024
ROTATED_BYTES = 4e8
PROGRAM_US = 600
EPS = 1e-5
GAIN = 1.01
"""A configuration that is not faster than XLA by this factor is not worth a kernel."""


@dataclass(frozen=True)
class Shape:
    """One weight of the model."""

    name: str
    n: int
    k: int
    gated: bool = False

    @property
    def planes(self) -> int:
        """Products with the same x."""
        return 2 if self.gated else 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy."""
        return 2 * self.planes * self.n * self.k

    @property
    def copies(self) -> int:
        """Copies that together are too large for the L2 cache."""
        return max(2, math.ceil(ROTATED_BYTES / self.weight_bytes))

    @property
    def products(self) -> int:
        """Products in one timed program: whole rounds over the copies, long enough to hide its launch."""
        return self.copies * math.ceil(PROGRAM_US / (self.copies * self.weight_bytes / COPY_BYTES_PER_US))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qkv", 6144, 4096),
        Shape("o", 4096, 4096),
        Shape("gate_up", 14336, 4096, gated=True),
        Shape("down", 4096, 14336),
        Shape("head", 128256, 4096),
    )
}


@dataclass(frozen=True)
class Variant:
    """What is fused with the product."""

    name: str
    norm: bool = False
    residual: bool = False


PLAIN, NORM, RESIDUAL = Variant("plain"), Variant("norm", norm=True), Variant("residual", residual=True)


@dataclass(frozen=True)
class Operands:
    """Random inputs: copies of the weights, as many x, and what a variant adds."""

    weights: list[jax.Array]
    x: list[jax.Array]
    gamma: jax.Array
    residual: jax.Array


def power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def estimate(shape: Shape, m: int, config: Config) -> float | None:
    """Microseconds by a rough model of bandwidth, waves and bytes in flight; None if the configuration cannot run."""
    threads = 32 * config.num_warps
    blocks = shape.k // config.block_k
    weight_block = 2 * shape.planes * config.block_n * config.block_k
    if config.tensor_cores:
        # wgmma takes 64 rows and four warps, and holds one buffer more than the older instructions.
        wgmma = config.block_n >= 64 and config.num_warps % 4 == 0
        buffers = config.num_stages if wgmma else config.num_stages - 1
        shared = buffers * (weight_block + 2 * config.block_m * config.block_k)
        sums = shape.planes * config.block_n * config.block_m // threads
        rate = FLOP_PER_US if wgmma else FLOP_PER_US / 2
    else:
        buffers, shared, rate = 1, 0, FLOP_PER_US / 20
        sums = shape.planes * config.block_m * config.block_n * config.block_k // threads
    held = min(SHARED_BYTES // (shared + 1024), 2048 // threads, 65536 // (threads * (sums + 64)), 16)
    if not config.takes(shape.k) or shared > SHARED_BYTES or sums > 128 or held == 0:
        return None
    if blocks // config.splits < (config.num_stages if config.tensor_cores else 1):
        return None
    m_tiles, n_tiles = -(-m // config.block_m), -(-shape.n // config.block_n)
    programs, slots = m_tiles * n_tiles * config.splits, SMS * held
    waves = programs / slots
    partials = 0 if config.splits == 1 else 8 * config.splits * shape.planes * m * shape.n
    memory = (shape.weight_bytes + partials) / COPY_BYTES_PER_US
    cache = (m_tiles * shape.weight_bytes + n_tiles * 2 * m * shape.k) / L2_BYTES_PER_US
    flops = 2 * shape.planes * m_tiles * config.block_m * shape.n * shape.k / rate
    in_flight = min(programs, slots) * buffers * weight_block
    quantised = math.ceil(waves) / waves if waves > 1 else 1.0
    busy = (max(memory, cache, flops) + 0.1 * (memory + cache + flops)) * quantised * (1 + 5e5 / in_flight)
    return busy + 0.3 * math.ceil(waves) + 2.0 * (config.splits > 1)


def candidates(shape: Shape, m: int, count: int) -> list[Config]:
    """The best configurations by the model, without near duplicates; for few rows half of them without tensor cores."""
    padded = min(256, max(16, power_of_two(m)))
    dots = itertools.starmap(
        Config,
        itertools.product(
            (16, 32, 64, 128, 256), {padded, min(padded, 128), min(padded, 64)}, (64, 128, 256, 512),
            (1, 2, 3, 4, 6, 8), (4, 8), (3, 4, 5, 6),
        ),
    )  # fmt: skip
    by_row = itertools.starmap(
        Config, itertools.product((1, 2, 4, 8, 16), (power_of_two(m),), (256, 512, 1024, 2048), (1,), (2, 4, 8), (1,))
    )
    few = m <= 4

    def best(configs: Any, count: int) -> list[Config]:
        guesses = [(guess, config) for config in configs if (guess := estimate(shape, m, config)) is not None]
        tiles: Counter[tuple[int, ...]] = Counter()
        chosen = []
        for _, config in sorted(guesses):
            tile = (config.block_n, config.block_m, config.splits)
            tiles[tile] += 1
            tiles[*tile, config.block_k] += 1
            if tiles[tile] <= 6 and tiles[*tile, config.block_k] <= 3:
                chosen.append(config)
        return chosen[:count]

    return best(dots, count - count // 2 * few) + (best(by_row, count // 2) if few else [])


def one_product(
    shape: Shape, variant: Variant, implementation: Any
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """The function (x, w, gamma, residual) that is measured."""

    def run(x: jax.Array, w: jax.Array, gamma: jax.Array, residual: jax.Array) -> jax.Array:
        norm = Norm(gamma, EPS) if variant.norm else None
        if shape.gated:
            return gated_linear(x, w, norm=norm, implementation=implementation)
        added = residual if variant.residual else None
        return linear(x, w, residual=added, norm=norm, implementation=implementation)

    return run


def program(
    shape: Shape, variant: Variant, implementation: Any, operands: Operands, products: int
) -> Callable[[], list[jax.Array]]:
    """A compiled program of `products` consecutive products; a barrier makes each wait for the one before."""
    product = jax.jit(one_product(shape, variant, implementation))

    def run(weights: list[jax.Array], x: list[jax.Array], gamma: jax.Array, residual: jax.Array) -> list[jax.Array]:
        results: list[jax.Array] = []
        for i in range(products):
            now = x[i % len(x)]
            if results:
                now, results[-1] = lax.optimization_barrier((now, results[-1]))
            results.append(product(now, weights[i % len(weights)], gamma, residual))
        return results

    inputs = (operands.weights, operands.x, operands.gamma, operands.residual)
    compiled = jax.jit(run).lower(*inputs).compile()
    return lambda: compiled(*inputs)


def microseconds(run: Callable[[], list[jax.Array]], products: int) -> float:
    """The median time of one product."""
    for _ in range(3):
        jax.block_until_ready(run())
    times = []
    for _ in range(10):
        started = time.perf_counter()
        for _ in range(4):
            results = run()
        jax.block_until_ready(results)
        times.append((time.perf_counter() - started) / (4 * products))
    return 1e6 * statistics.median(times)


def exact(shape: Shape, variant: Variant, operands: Operands) -> jax.Array:
    """The first product in float32."""

    def run(weights: jax.Array, x: jax.Array, gamma: jax.Array, residual: jax.Array) -> jax.Array:
        x, gamma = x.astype(jnp.float32), gamma.astype(jnp.float32)
        if variant.norm:
            x = x * lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + EPS) * gamma
        planes = weights.reshape(shape.planes, shape.n, shape.k).astype(jnp.float32)
        sums = jnp.einsum("mk,pnk->pmn", x, planes, precision=lax.Precision.HIGHEST)
        result = jax.nn.silu(sums[0]) * sums[1] if shape.gated else sums[0]
        return result + residual.astype(jnp.float32) if variant.residual else result

    return jax.jit(run)(operands.weights[0], operands.x[0], operands.gamma, operands.residual)


def measure(
    shape: Shape, m: int, variant: Variant, configs: list[Config], operands: Operands, pool: ThreadPoolExecutor
) -> dict[Config | None, float]:
    """Microseconds of every correct configuration, and of XLA under None; prints each."""
    expected = exact(shape, variant, operands)
    jobs: dict[Config | None, Any] = {
        config: pool.submit(program, shape, variant, config or "xla", operands, shape.products)
        for config in (None, *configs)
    }
    failures = {config: job.exception() for config, job in jobs.items()}
    times: dict[Config | None, float] = {}
    for config, job in jobs.items():
        row = {"shape": shape.name, "rows": m, "variant": variant.name, "config": config and list(config)}
        if failures[config] is not None:
            print(json.dumps(row | {"failed": str(failures[config])[:200]}), flush=True)
            continue
        try:
            run = job.result()
            got = run()[0].astype(jnp.float32)
            error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
            spent = microseconds(run, shape.products)
        except jax.errors.JaxRuntimeError as failure:
            print(json.dumps(row | {"failed": str(failure)[:200]}), flush=True)
            continue
        row |= {
            "us": round(spent, 2),
            "percent_of_copy": round(100 * shape.weight_bytes / COPY_BYTES_PER_US / spent, 1),
            "tflops": round(1e-6 * m * shape.weight_bytes / spent, 1),
            "error": float(f"{error:.1e}"),
        }
        if error < 1e-2:
            times[config] = spent
        else:
            row["wrong"] = True
        print(json.dumps(row), flush=True)
    return times


def draw(shape: Shape, m: int, weights: list[jax.Array]) -> Operands:
    keys = jax.random.split(jax.random.key(m), len(weights) + 2)
    x = [jax.random.normal(key, (m, shape.k), jnp.bfloat16) for key in keys[2:]]
    gamma = 1 + 0.1 * jax.random.normal(keys[0], (shape.k,), jnp.bfloat16)
    return Operands(weights, x, gamma, jax.random.normal(keys[1], (m, shape.n), jnp.bfloat16))


def sweep(shape: Shape, rows: list[int], count: int, pool: ThreadPoolExecutor) -> dict[int, Config | None]:
    """The best configuration for each number of rows; None if XLA is as fast."""
    size = (2, shape.n, shape.k) if shape.gated else (shape.n, shape.k)
    scale = jnp.bfloat16(shape.k**-0.5)
    weights = [jax.random.normal(jax.random.key(i), size, jnp.bfloat16) * scale for i in range(shape.copies)]
    best: dict[int, Config | None] = {}
    for m in rows:
        operands = draw(shape, m, weights)
        times = measure(shape, m, PLAIN, candidates(shape, m, count), operands, pool)
        ranked = sorted((spent, config) for config, spent in times.items() if config is not None)
        winner = ranked[0] if ranked and ranked[0][0] * GAIN < times.get(None, math.inf) else None
        best[m] = winner and winner[1]
        for variant in (NORM,) if shape.gated else (NORM, RESIDUAL):
            measure(shape, m, variant, [config for _, config in ranked[:3]], operands, pool)
    return best


def main() -> None:
    """Sweep every shape, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default="1,8,16,32,64,128,256")
    parser.add_argument("--configs", type=int, default=24, help="configurations for each shape and number of rows")
    parser.add_argument("--quick", action="store_true", help="a third of the configurations")
    parser.add_argument("--threads", type=int, default=16, help="compilations at once")
    args = parser.parse_args()
    count = args.configs // 3 if args.quick else args.configs
    table = {}
    with ThreadPoolExecutor(args.threads) as pool:
        for name in args.shapes.split(","):
            shape = SHAPES[name]
            started = time.perf_counter()
            best = sweep(shape, sorted(map(int, args.rows.split(","))), count, pool)
            table[shape.n, shape.k, shape.gated] = best
            print(json.dumps({"shape": name, "seconds": round(time.perf_counter() - started)}), flush=True)
    kind = jax.devices()[0].device_kind
    rows = [
        {"n": n, "k": k, "gated": gated, "rows": m, "config": config and list(config)}
        for (n, k, gated), best in table.items()
        for m, config in best.items()
    ]
    print(json.dumps({"device": kind, "best": rows, "tuned": repr(table)}), flush=True)


if __name__ == "__main__":
    main()
