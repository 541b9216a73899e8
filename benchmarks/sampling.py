"""The time of drawing tokens on one GPU: greedy in two ways, and the sampling kernel with each of its settings.

    python benchmarks/sampling.py [--batches 1 64 256] [--vocab 128256] [--sweep]

Prints one JSON line for each measurement, in microseconds a call: the median over repeats of a compiled loop of calls
with different seeds, less an empty loop. Before a case is timed, the kernel's tokens are compared with those of the XLA
reference.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.sampling import greedy, pallas_triton, sample

CALLS, REPEATS = 100, 9
SETTINGS = {
    "greedy rows": {"temperature": 0.0},
    "t=1": {"temperature": 1.0},
    "t=0.8 p=0.9": {"temperature": 0.8, "top_p": 0.9},
    "t=0.8 k=50": {"temperature": 0.8, "top_k": 50},
    "t=0.8 k=50 p=0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "t=0.8 min_p=0.05": {"temperature": 0.8, "min_p": 0.05},
}
SWEPT = "t=0.8 p=0.9"
SPREADS = {"narrow": 4.0, "wide": 2.0}
"""Standard deviations of the normal logits: a nucleus of 0.9 has tens of tokens in the one and thousands in the other,
at a temperature of 0.8. The line of each case says how many."""

Params = dict[str, jax.Array]
Choose = Callable[[jax.Array, Params], jax.Array]


def make_params(rows: int, **setting: float) -> Params:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | setting
    params = {name: jnp.full(rows, value, jnp.float32) for name, value in values.items()}
    seed = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (rows, 2), dtype=np.uint32))
    return params | {
        "top_k": params["top_k"].astype(jnp.int32),
        "seed": seed,
        "position": jnp.arange(rows, dtype=jnp.int32),
    }


def microseconds(choose: Choose, logits: jax.Array, params: Params) -> float:
    """A call's median time. Its inputs depend on the call before, so that XLA cannot move work out of the loop."""

    @partial(jax.jit, donate_argnums=0)
    def loop(logits: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
        def step(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits, total = carry
            tokens = choose(logits, params | {"position": params["position"] + total})
            changed = jnp.full((1, 1), -30 - tokens[0] % 2, logits.dtype)
            return lax.dynamic_update_slice(logits, changed, (0, 0)), total + tokens % 7 + 1

        return lax.fori_loop(0, CALLS, step, (logits, jnp.zeros(logits.shape[0], jnp.int32)))

    times = []
    logits = logits.copy()
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        logits, total = loop(logits, params)
        total.block_until_ready()
        times.append((time.perf_counter() - began) / CALLS)
    return 1e6 * float(np.median(times[2:]))


def nothing(logits: jax.Array, _: Params) -> jax.Array:
    return logits[:, 0].astype(jnp.int32)


def argmax(logits: jax.Array, _: Params) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def two_reductions(logits: jax.Array, _: Params) -> jax.Array:
    return greedy(logits)


def reference(logits: jax.Array, params: Params) -> jax.Array:
    return sample(logits, **params, implementation="xla")


def kernel(tuning: pallas_triton.Tuning, logits: jax.Array, params: Params) -> jax.Array:
    return pallas_triton.sample(logits, **params, tuning=tuning)


def tunings() -> list[pallas_triton.Tuning]:
    default = pallas_triton.Tuning()
    changes = [{"tile": tile, "warps": warps} for tile, warps in ((256, 2), (512, 8), (1024, 4), (1024, 8))]
    changes += [{"top_p_ways": ways, "top_k_ways": ways} for ways in (4, 8, 16, 32)]
    changes += [{"programs": programs} for programs in (264, 528, 2112, 4224)]
    return [dataclasses.replace(default, **change) for change in changes]


def nucleus_sizes(logits: jax.Array, temperature: float = 0.8, top_p: float = 0.9) -> list[int]:
    """The least and the greatest size of a row's nucleus: the fewest tokens whose probabilities reach `top_p`."""
    ranked = jnp.sort(jax.nn.softmax(logits.astype(jnp.float32) / temperature, axis=-1), axis=-1)[:, ::-1]
    sizes = 1 + jnp.sum(jnp.cumsum(ranked, axis=-1) < top_p, axis=-1)
    return [int(sizes.min()), int(sizes.max())]


def report(**line: object) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sweep", action="store_true", help="time other settings of the kernel too")
    args = parser.parse_args()
    device = jax.devices()[0]
    report(jax=jax.__version__, device=device.device_kind, vocab=args.vocab, dtype=args.dtype)
    for batch in args.batches:
        for spread, deviation in SPREADS.items():
            drawn = jax.random.normal(jax.random.key(batch), (batch, args.vocab), jnp.float32) * deviation
            logits = drawn.astype(args.dtype)
            timed = partial(microseconds, logits=logits)
            empty = timed(nothing, params=make_params(batch))
            report(batch=batch, logits=spread, nucleus=nucleus_sizes(logits), empty_loop_us=round(empty, 1))
            for name, choose in (("argmax", argmax), ("two reductions", two_reductions)):
                us = timed(choose, params=make_params(batch)) - empty
                report(batch=batch, logits=spread, case="greedy", variant=name, us=round(us, 1))
            for case, setting in SETTINGS.items():
                params = make_params(batch, **setting)
                expected = np.asarray(jax.jit(reference)(logits, params))
                for tuning in [pallas_triton.Tuning(), *(tunings() if args.sweep and case == SWEPT else [])]:
                    choose = partial(kernel, tuning)
                    differing = int((np.asarray(jax.jit(choose)(logits, params)) != expected).sum())
                    us = timed(choose, params=params) - empty
                    report(batch=batch, logits=spread, case=case, variant=dataclasses.asdict(tuning), us=round(us, 1),
                           tokens_that_differ=differing)  # fmt: skip


if __name__ == "__main__":
    main()
