"""Products of activations with a model's weights on one GPU: tile sizes of the kernels against each other and XLA.

    python benchmarks/matmul.py [--models llama-3.1-8b ...] [--rows 1 8 32 128] [--configs 16] [--seconds 600]

Prints one JSON line for each product and configuration: microseconds by the device's clock, the median of several runs
over different copies of the weights, which together exceed the L2 cache; and the relative error against float32. The
line of XLA has no configuration. No product is begun after `--seconds`.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from device_clock import device_microseconds
from jax import lax
from shapes import SHAPES

from pallas_kernels.matmul import Config, Wide, gated_linear, linear

Sizes = Config | Wide
COPIED_BYTES = 1.5e8
"""Copies of a weight take more than this together: twice the L2 cache."""
RUNS = 6


@dataclass(frozen=True)
class Product:
    """One weight of a model: w [n, k], or [2, n, k] of a gated product."""

    name: str
    n: int
    k: int
    gated: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (2, self.n, self.k) if self.gated else (self.n, self.k)

    @property
    def weight_bytes(self) -> int:
        """The size of the weight in bfloat16."""
        return 2 * math.prod(self.shape)


def products(model: str) -> list[Product]:
    """The products of one layer."""
    config = SHAPES[model]
    hidden, mlp, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    return [
        Product(f"{model} qkv", (heads + 2 * kv) * dim, hidden),
        Product(f"{model} o", hidden, heads * dim),
        Product(f"{model} gate_up", mlp, hidden, gated=True),
        Product(f"{model} down", hidden, mlp),
    ]


def compute(product: Product, sizes: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product by a kernel with tile sizes, or by XLA."""
    return (gated_linear if product.gated else linear)(x, w, implementation=sizes)


def exact(product: Product, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product in float32."""
    planes = w.reshape(-1, product.n, product.k)
    sums = jnp.einsum(
        "mk,pnk->pmn", *(each.astype(jnp.float32) for each in (x, planes)), precision=lax.Precision.HIGHEST
    )
    return jax.nn.silu(sums[0]) * sums[1] if product.gated else sums[0]


def candidates(product: Product, m: int) -> Iterator[Sizes]:
    """Every configuration that makes sense, in an order that tries different tiles before different depths."""
    padded = max(16, 1 << (m - 1).bit_length())
    if m <= 4:
        by_row = itertools.product((1024, 512, 2048, 256), (4, 8), (8, 16, 4, 2, 32))
        yield from (Config(block_n, m, block_k, 1, warps, 1) for block_k, warps, block_n in by_row)
    if m >= 128:
        yield from (Wide(tile_n, cluster) for cluster in (1, 2) for tile_n in (128, 256, 64, 96, 112, 160, 192, 224))
    deep = [(256, 4), (128, 6), (128, 4), (512, 3), (64, 6), (256, 3)]
    tiles = itertools.product((64, 128, 32, 16), dict.fromkeys((padded, min(padded, 64))), (1, 2, 4, 3, 8))
    for (block_k, stages), (block_n, block_m, splits) in itertools.product(deep, tiles):
        for warps in (4, 8) if block_n * block_m >= 8192 else (4,):
            yield Config(block_n, block_m, block_k, splits, warps, stages, normalises=False)


def plausible(product: Product, m: int, count: int, multiprocessors: int = 132) -> list[Sizes]:
    """The first candidates that fill the multiprocessors and fit their shared memory, few of each kind of tile."""
    planes, chosen = len(product.shape) - 1, []
    kinds: Counter[Any] = Counter()
    limit = math.ceil(count / 5)
    for sizes in candidates(product, m):
        if not sizes.takes(m, product.n, product.k):
            continue
        if isinstance(sizes, Config):
            programs = -(-m // sizes.block_m) * -(-product.n // sizes.block_n) * sizes.splits
            shared = 2 * sizes.num_stages * sizes.block_k * (planes * sizes.block_n + sizes.block_m)
            each = product.k // sizes.block_k // sizes.splits
            if sizes.tensor_cores and (shared > 220_000 or each < sizes.num_stages or programs * shared < 64_000 * 132):
                continue
            if planes * sizes.block_n * sizes.block_m > 32_768 or programs < 0.7 * multiprocessors:
                continue
            if sizes.splits > 1 and programs > 6 * multiprocessors:
                continue
            if not sizes.tensor_cores and planes * sizes.block_n * sizes.block_k > 16_384 * sizes.num_warps // 4:
                continue
            kind: Any = (sizes.block_n, sizes.block_m, sizes.tensor_cores)
        else:
            kind = sizes.cluster
        kinds[kind] += 1
        if kinds[kind] <= limit:
            chosen.append(sizes)
    few = [each for each in chosen if isinstance(each, Wide) or not each.tensor_cores][: count // 2]
    return [*few, *[each for each in chosen if each not in few][: count - len(few)]]


def measure(product: Product, m: int, count: int, pool: ThreadPoolExecutor) -> None:
    """Check and time every configuration of one product, and print their lines."""
    copies = max(RUNS, math.ceil(COPIED_BYTES / product.weight_bytes))
    draw = jax.jit(lambda key, shape, scale: jax.random.normal(key, shape, jnp.bfloat16) * scale, static_argnums=1)
    scale = jnp.bfloat16(product.k**-0.5)
    weights = [draw(jax.random.key(i), product.shape, scale) for i in range(copies)]
    x = draw(jax.random.key(copies), (m, product.k), jnp.bfloat16(1))
    expected = jax.jit(partial(exact, product))(x, weights[0])
    sizes: list[Any] = ["xla", *plausible(product, m, count)]
    jobs = [
        pool.submit(lambda each=each: jax.jit(partial(compute, product, each)).lower(x, weights[0]).compile())
        for each in sizes
    ]
    ready, turn = [], itertools.count()
    for each, job in zip(sizes, jobs, strict=True):
        line = {"product": product.name, "n": product.n, "k": product.k, "gated": product.gated, "rows": m}
        line |= {"config": None if each == "xla" else [type(each).__name__, *each]}
        try:
            run = job.result()
            difference = jnp.linalg.norm(run(x, weights[0]).astype(jnp.float32) - expected)
            ready.append((line | {"error": float(f"{difference / jnp.linalg.norm(expected):.1e}")}, run))
        except Exception as failure:  # whatever a configuration cannot be compiled for
            print(json.dumps(line | {"failed": str(failure)[:200]}), flush=True)

    def call(run: Callable[..., Any]) -> Any:
        return run(x, weights[next(turn) % copies])

    try:
        taken = device_microseconds([partial(call, run) for _, run in ready for _ in range(RUNS)])
    except ValueError as failure:
        print(json.dumps({"product": product.name, "rows": m, "failed": str(failure)}), flush=True)
        return
    for index, (line, _) in enumerate(ready):
        us = statistics.median(taken[index * RUNS : (index + 1) * RUNS])
        line |= {"us": round(us, 2), "tb_s": round(product.weight_bytes / us / 1e6, 3)}
        print(json.dumps(line), flush=True)


def main() -> None:
    """Measure the products of every model at every number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3.1-8b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--configs", type=int, default=16, help="configurations of each product")
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    began = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        for model, m in itertools.product(args.models, args.rows):
            for product in products(model):
                if time.perf_counter() - began < args.seconds:
                    measure(product, m, args.configs, pool)


if __name__ == "__main__":
    main()
