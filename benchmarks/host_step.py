"""The host's work in one engine step, without a device: prints a table of milliseconds.

    python benchmarks/host_step.py [--rows 256] [--iterations 300] [--max-seq-len 4096]

Every row decodes: in "decode 1" one token a step, in "decode 8" eight a dispatch. "churn" is a ragged step in which one
sequence ends and another with a prompt of 512 tokens begins. The parts are `Scheduler.schedule`, packing the step's
inputs into one vector, reading the step's result, and `Scheduler.commit`, one step behind as in the engine. Numbers are
medians; a device whose step takes less than the total waits for the host.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pallas_kernels.devices import Platform
from trtllm_jax.engine import steps
from trtllm_jax.engine.block_pool import BlockPool
from trtllm_jax.engine.cache_manager import Group, KVCacheManager
from trtllm_jax.engine.config import token_buckets
from trtllm_jax.engine.flight import InFlight
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.packer import pack_decode, pack_ragged
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.programs import bucket_for
from trtllm_jax.engine.request import Request
from trtllm_jax.engine.scheduler import Scheduler
from trtllm_jax.requests.sampling_params import SamplingParams

PARTS = ("schedule", "pack", "read", "commit")
PAGE_SIZE = 32
GPU = Platform("gpu")
PROMPT = 512
MAX_NUM_TOKENS = 8192
NEVER_DRAWN = 10**6


class Step:
    """A scheduler full of decoding rows, and the times of the parts of its steps."""

    def __init__(self, rows: int, max_decode_steps: int, max_seq_len: int) -> None:
        limits = SchedulerLimits(rows, MAX_NUM_TOKENS, max_seq_len, max_decode_steps)
        pool = BlockPool(2 * rows * max_seq_len // PAGE_SIZE, PAGE_SIZE)
        self.scheduler = Scheduler(limits, KVCacheManager(limits, [Group(pool)]))
        self.limits = limits
        self.decode_layout = steps.decode_layout(rows, 1, 1, steps.Draw(False, 0))
        width = -(-max_seq_len // PAGE_SIZE)
        self.ragged_layouts = {
            tokens: steps.ragged_layout(tokens, rows, (width,)) for tokens in token_buckets(MAX_NUM_TOKENS, GPU)
        }
        self.flight: InFlight | None = None
        self.milliseconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.rng = np.random.default_rng(0)

    def submit(self, max_tokens: int) -> None:
        """Submit one more sequence, with a random prompt."""
        sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=1).resolved()
        prompt = self.rng.integers(0, NEVER_DRAWN, PROMPT).tolist()
        self.scheduler.submit(Request(prompt, max_tokens, sampling, frozenset({NEVER_DRAWN})))

    def run(self) -> None:
        """Run one iteration of the engine's loop: plan and pack a step, then read and commit the previous one."""
        plan = self._timed("schedule", self.scheduler.schedule)
        assert plan is not None
        self._timed("pack", lambda: self._pack(plan))
        if flight := self.flight:
            output = self._timed("read", lambda: flight.output(lambda results: results))
            self._timed("commit", lambda: self.scheduler.commit(flight.plan, output))
        self.flight = InFlight(plan, {"tokens": self._result(plan)})

    def _timed(self, part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        self.milliseconds[part].append((time.perf_counter() - started) * 1e3)
        return result

    def _pack(self, plan: StepPlan) -> np.ndarray:
        rows = self.limits.max_batch_size
        if plan.kind == "decode":
            return pack_decode(plan, (), self.decode_layout, rows, rows)
        bucket = bucket_for(len(plan.tokens), token_buckets(MAX_NUM_TOKENS, GPU))
        return pack_ragged(plan, self.ragged_layouts[bucket], rows, rows)

    def _result(self, plan: StepPlan) -> Any:
        """A result as the device returns it, in which every row gains as many tokens as the plan allows."""
        gained = np.minimum(plan.steps, [request.max_tokens - len(request.generated) for request in plan.requests])
        tokens = np.ones((len(plan.requests), plan.steps), np.int32)
        return np.concatenate(
            [(plan.emits if plan.kind == "ragged" else gained)[:, None], tokens], axis=1, dtype=np.int32
        )


def decoding(rows: int, max_decode_steps: int, max_seq_len: int) -> Iterator[Step]:
    """Steps of long sequences; before one would end, all are replaced by new ones."""
    while True:
        step = Step(rows, max_decode_steps, max_seq_len)
        for _ in range(rows):
            step.submit(max_seq_len - PROMPT)
        running = step.scheduler.running
        while len(running) < rows or running[-1].prefilling:
            step.run()
        while all(request.limit - request.computed_max > 2 * max_decode_steps for request in running):
            yield step


def churning(rows: int, max_seq_len: int) -> Iterator[Step]:
    """Steps in each of which one sequence ends and another begins."""
    step = Step(rows, 1, max_seq_len)
    for index in range(rows):
        step.submit(index + 1)
    while True:
        yield step
        step.submit(rows)


def measure(steps_to_run: Iterator[Step], iterations: int) -> dict[str, float]:
    """Median milliseconds of each part over `iterations` steps, after a tenth as many for warm-up."""
    collected: dict[str, list[float]] = {part: [] for part in PARTS}
    for index, step in enumerate(itertools.islice(steps_to_run, iterations + iterations // 10)):
        step.run()
        if index >= iterations // 10:
            for part, values in step.milliseconds.items():
                collected[part].append(values[-1])
    return {part: statistics.median(values) for part, values in collected.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--max-seq-len", type=int, default=4096)
    args = parser.parse_args()
    cases = {
        "decode 1": decoding(args.rows, 1, args.max_seq_len),
        "decode 8": decoding(args.rows, 8, args.max_seq_len),
        "churn": churning(args.rows, args.max_seq_len),
    }
    print(f"{f'{args.rows} rows, ms':16}" + "".join(f"{part:>10}" for part in (*PARTS, "total")))
    for name, case in cases.items():
        medians = measure(case, args.iterations)
        print(f"{name:16}" + "".join(f"{value:10.3f}" for value in (*medians.values(), sum(medians.values()))))


if __name__ == "__main__":
    main()
