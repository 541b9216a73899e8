"""Runs the commands of `trtllm-bench`: checks, one engine, its measurements, a report."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from trtllm_jax.commands.bench import report as bench_report
from trtllm_jax.commands.bench.measure import (
    measure_batch,
    measure_requests,
    require_decoding,
    require_uncached,
    run_batch,
)
from trtllm_jax.commands.bench.model import ModelFacts
from trtllm_jax.commands.bench.options import Common
from trtllm_jax.commands.bench.profile import profile
from trtllm_jax.commands.bench.request_results import RequestsResult
from trtllm_jax.commands.bench.startup import measure_startup
from trtllm_jax.commands.bench.workload import BenchRequest, read_dataset, synthetic_requests
from trtllm_jax.commands.click_options import Bounds
from trtllm_jax.logger import progress

BATCH_WARMUP = 1
REQUESTS_WARMUP = 2
MAX_WARMUP = 256
"""Most warm-up requests without a concurrency bound: a GPU engine's default batch size."""

FEW_REQUESTS = 32
"""Up to this many unbounded requests set the engine's batch size to their number; more leave it at the default."""

Report = Callable[[bench_report.Result], None]


@dataclass(frozen=True)
class Workload:
    """Requests to send: those of a dataset, or random prompts of equal sizes.

    Attributes:
        dataset: the file, None for random prompts.
        count: the number of requests; None or 0 for all of the file, or for `default_count` random ones.
        default_count: see `count`.
        input_len: tokens of each random prompt.
        output_len: tokens generated for each.
        prefix: length in tokens of the prefix that all random prompts share.
    """

    dataset: Path | None
    count: int | None
    default_count: int
    input_len: int
    output_len: int
    prefix: int = 0

    def requests(self, common: Common, facts: ModelFacts) -> list[BenchRequest]:
        """The requests. ValueError if the dataset is invalid, or random prompts do not fit the model."""
        if self.dataset:
            encode = facts.encoder(common.tokenizer)
            return read_dataset(self.dataset, vocab=facts.vocab, encode=encode, limit=self.count or None)
        require_uncached(self.prefix, self.input_len)
        facts.require_length(self.input_len + self.output_len)
        count = self.count or self.default_count
        sizes = (count, self.input_len, self.output_len)
        return synthetic_requests(*sizes, vocab=facts.vocab, seed=common.seed, prefix=self.prefix)


def fixed_batches(
    common: Common, batch_sizes: Sequence[int], input_lens: Sequence[int], output_lens: Sequence[int]
) -> None:
    """Measure every combination of the three lists."""
    require_decoding(min(output_lens))
    facts, length = _facts(common), max(input_lens) + max(output_lens)
    facts.require_length(length)
    arguments = common.llm_arguments(batch=max(batch_sizes), length=length)
    rows = arguments["max_batch_size"]
    if rows is not None and rows < max(batch_sizes):
        raise ValueError(
            f"max_batch_size = {rows} is below batch_size = {max(batch_sizes)}: raise it, leave it out, or lower "
            "batch_size"
        )
    points = [(batch, given, new) for given in input_lens for new in output_lens for batch in batch_sizes]
    shared: dict[str, Any] = {"vocab": facts.vocab, "sampling": common.sampling, "seed": common.seed}
    warmup = BATCH_WARMUP if common.warmup is None else common.warmup
    skipped = 0
    with _engine(common, arguments, len(points)) as (llm, report, tick):
        for point in points:
            try:
                report(measure_batch(llm, *point, repeats=common.repeats, warmup=warmup, **shared))
            except ValueError as error:  # of a sweep, the other points may fit
                skipped += 1
                if skipped == len(points):
                    raise
                click.echo(f"Skipped: {error}", err=True)
                continue
            finally:
                tick()
            if common.profile:
                folder = Path(common.profile, "batch{}-in{}-out{}".format(*point))
                report(profile(partial(run_batch, llm, *point, **shared), folder, decode_steps=point[2] - 1))


def requests(common: Common, workload: Workload, bounds: Bounds, request_rate: float | None) -> None:
    """Warm up with requests of the same sizes, then measure all of them, under each bound of concurrency."""
    facts = _facts(common)
    sent = workload.requests(common, facts)
    length = max(request.length for request in sent)
    facts.require_length(length)
    concurrent = min(len(sent), max(bound or len(sent) for bound in bounds))
    batch = concurrent if None not in bounds or concurrent <= FEW_REQUESTS else None
    arguments = common.llm_arguments(batch=batch, length=length, reuse=workload.prefix > 0)
    shared: dict[str, Any] = {
        "request_rate": request_rate,
        "devices": int(arguments.get("tensor_parallel_size") or 1),
        "sampling": common.sampling,
        "seed": common.seed,
    }
    warmup = REQUESTS_WARMUP if common.warmup is None else common.warmup
    with _engine(common, arguments, len(sent) * len(bounds)) as (llm, report, tick):
        shared["cached_prefix"] = _cacheable_prefix(llm, workload.prefix, length)
        reuse = bool(arguments["kv_cache_config"]["enable_block_reuse"])
        runs, warmups = itertools.count(), itertools.count(1)
        for bound in bounds:
            if warmup:
                # With the concurrency of the measurement, so that every program has run before it is measured.
                count = max(warmup, min(bound or MAX_WARMUP, len(sent)))
                warmup_requests = _same_sizes(sent[:count], workload.prefix, facts.vocab, -next(warmups))
                measure_requests(llm, warmup_requests, concurrency=bound, sampling=common.sampling)

            def run(advance: Callable[[], object] = lambda: None, bound: int | None = bound) -> RequestsResult:
                # With the prefix cache on, new prompts each time, so that no run finds the prompts of another.
                fresh = _same_sizes(sent, workload.prefix, facts.vocab, next(runs)) if reuse else sent
                return measure_requests(llm, fresh, concurrency=bound, progress=advance, **shared)

            report(run(tick))
            if common.profile:
                report(profile(run, Path(common.profile, f"concurrency-{bound or 'unbounded'}")))


def startup_times(common: Common, input_len: int) -> None:
    """Time two starts of a fresh process: with an empty, then with a filled compilation cache."""
    facts = _facts(common)
    facts.require_length(input_len + 1)
    arguments = common.llm_arguments(batch=1, length=input_len + 1)
    (request,) = synthetic_requests(1, input_len, 1, vocab=facts.vocab, seed=common.seed)
    with _reporting(common, arguments) as report, progress(2, "Starting") as bar:
        for result in measure_startup(arguments, request.prompt, common.sampling):
            report(result)
            bar.update()


def _same_sizes(requests: Sequence[BenchRequest], prefix: int, vocab: int, shift: int) -> list[BenchRequest]:
    """Requests of the same sizes whose first `prefix` ids are the same and the others shifted, and so not cached."""
    return [
        BenchRequest(
            one.prompt[:prefix] + [(token + shift) % vocab for token in one.prompt[prefix:]], one.output_tokens
        )
        for one in requests
    ]


def _cacheable_prefix(llm: Any, prefix: int, length: int) -> int:
    """The tokens of a prefix's whole blocks; ValueError if there is none, or a request does not fit the cache."""
    capacity = llm.get_kv_cache_capacity()
    tokens, block = capacity["maxNumTokens"], capacity["tokensPerBlock"]
    if tokens < length:
        raise ValueError(
            f"a request of {length} tokens does not fit the KV cache of {tokens}: raise kv_cache_max_tokens or "
            "kv_cache_free_gpu_mem_fraction, or shorten the prompts or answers"
        )
    if 0 < prefix < block:
        raise ValueError(
            f"cached_prefix = {prefix} is less than a block of {block} tokens, and only whole blocks are cached: "
            f"use at least {block}"
        )
    found: int = prefix // block * block
    return found


def _facts(common: Common) -> ModelFacts:
    """The model's properties, after a check that the plot can be drawn."""
    if common.plot:
        bench_report.require_plotting()
    return ModelFacts(common.location)


@contextmanager
def _engine(
    common: Common, arguments: dict[str, Any], total: int
) -> Iterator[tuple[Any, Report, Callable[[], object]]]:
    """A context with an LLM, a function that takes results, and one that advances a bar of `total` steps."""
    from trtllm_jax import LLM

    try:
        opened = LLM(**arguments)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # a subclass is a library's error, which needs its traceback
            raise
        raise ValueError(str(error)) from error  # too few devices
    with opened as llm, _reporting(common, arguments) as report, progress(total, "Measuring") as bar:
        llm.facts.require_generation()
        llm.warm_up()
        yield llm, report, bar.update


def _reporting(common: Common, arguments: dict[str, Any]) -> AbstractContextManager[Report]:
    return bench_report.reporting({"llm": arguments}, common.json_lines, common.report_json, common.plot)
