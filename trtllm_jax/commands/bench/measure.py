"""The measurements of `trtllm-bench`. Each takes an `LLM`, so that one engine serves many of them."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_jax.commands.bench.request_results import RequestsResult, RequestTimes
from trtllm_jax.commands.bench.results import BatchResult, FirstTokenResult
from trtllm_jax.commands.bench.workload import SEED, BenchRequest, arrival_times, random_prompts

if TYPE_CHECKING:
    from trtllm_jax import LLM, SamplingParams

GREEDY: Mapping[str, Any] = {}


def measure_batch(
    llm: "LLM",
    batch: int,
    input_len: int,
    output_len: int,
    *,
    vocab: int,
    repeats: int = 3,
    warmup: int = 1,
    sampling: Mapping[str, Any] = GREEDY,
    seed: int = SEED,
) -> BatchResult:
    """Times to generate one token and `output_len` tokens for `batch` random prompts, new ones each time.

    Args:
        llm: the model; its prefix cache should be off.
        batch: prompts that run together.
        input_len: tokens of each prompt.
        output_len: tokens generated for each, at least 2.
        vocab: ids are drawn from [0, vocab).
        repeats: measurements of each kind.
        warmup: runs of the same shape before them.
        sampling: arguments of `SamplingParams` besides lengths.
        seed: of the prompts.

    Raises:
        ValueError: a size is invalid, or the batch does not fit the engine.
    """
    require_decoding(output_len)
    _require_room(llm, batch, input_len + output_len)
    rng = np.random.default_rng(seed)

    def seconds(new: int) -> float:
        prompts = random_prompts(rng, batch, input_len, vocab)
        return _generate(llm, prompts, new, sampling)

    for _ in range(warmup):
        seconds(1)
        seconds(output_len)
    times = [(seconds(1), seconds(output_len)) for _ in range(repeats)]
    first, whole = zip(*times, strict=True)
    return BatchResult(batch, input_len, output_len, first, whole)


def run_batch(
    llm: "LLM",
    batch: int,
    input_len: int,
    output_len: int,
    *,
    vocab: int,
    sampling: Mapping[str, Any] = GREEDY,
    seed: int = SEED,
) -> None:
    """Run the workload of `measure_batch` once, for a profile."""
    _generate(llm, random_prompts(np.random.default_rng(seed), batch, input_len, vocab), output_len, sampling)


def measure_requests(
    llm: "LLM",
    requests: Sequence[BenchRequest],
    *,
    concurrency: int | None = None,
    request_rate: float | None = None,
    devices: int = 1,
    cached_prefix: int = 0,
    sampling: Mapping[str, Any] = GREEDY,
    seed: int = SEED,
    progress: Callable[[], object] = lambda: None,
) -> RequestsResult:
    """Times of streamed requests, as the caller observes them.

    Args:
        llm: the model.
        requests: what to send, in this order.
        concurrency: most requests in flight; None for no bound.
        request_rate: rate of a Poisson process of arrivals, requests/s; None to send all at once.
        devices: how many devices serve the model, for the rate of each.
        cached_prefix: passed on to the result.
        sampling: what `SamplingParams` takes besides lengths.
        seed: of the arrivals.
        progress: called after each request.

    Time a request spends waiting for `concurrency` is not part of its latency: that starts with its submit call.
    One asyncio loop watches all streams: where it is late it takes several steps at once, where a thread for each
    stream would compete with the engine's thread. With 64 streams on two cores neither differed beyond noise.
    """
    params = {new: sampling_params(new, sampling) for new in {request.output_tokens for request in requests}}
    arrivals = arrival_times(len(requests), request_rate, seed=seed)

    async def run_all() -> list[RequestTimes]:
        gate: AbstractAsyncContextManager[Any] = asyncio.Semaphore(concurrency) if concurrency else nullcontext()
        began = time.perf_counter()

        async def run(request: BenchRequest, arrival: float) -> RequestTimes:
            await asyncio.sleep(began + arrival - time.perf_counter())
            async with gate:
                times = await _stream(llm, request, params[request.output_tokens])
            progress()
            return times

        return await asyncio.gather(*map(run, requests, arrivals))

    times = sorted(asyncio.run(run_all()), key=lambda one: one.submitted)
    return RequestsResult(tuple(times), devices, concurrency, request_rate, cached_prefix)


def measure_first_token(
    llm: "LLM",
    input_len: int,
    *,
    vocab: int,
    cached: int = 0,
    repeats: int = 3,
    sampling: Mapping[str, Any] = GREEDY,
    seed: int = SEED,
) -> FirstTokenResult:
    """Times until the first token of one prompt at a time, whose first `cached` ids an earlier request computed.

    With `cached` the LLM must reuse blocks; whole blocks of the cache are found, so a multiple of its block size is
    what counts. A request with the same prefix runs first, which is also the warm-up. ValueError where `cached` is not
    below `input_len`.
    """
    require_uncached(cached, input_len)
    rng = np.random.default_rng(seed)
    (prefix,) = random_prompts(rng, 1, cached, vocab)

    def seconds() -> float:
        (tail,) = random_prompts(rng, 1, input_len - cached, vocab)
        return _generate(llm, [prefix + tail], 1, sampling)

    seconds()
    if cached:
        seconds()  # the first of its size that finds its prefix
    return FirstTokenResult(input_len, cached, tuple(seconds() for _ in range(repeats)))


def require_decoding(output_len: int) -> None:
    """ValueError if `output_len` is too small to measure a decode rate."""
    if output_len < 2:
        raise ValueError(f"output_len = {output_len} leaves no decode step to measure: use at least 2")


def require_uncached(cached: int, input_len: int) -> None:
    """ValueError if the cached prefix would cover the whole prompt."""
    if cached >= input_len:
        raise ValueError(
            f"cached_prefix = {cached} is not below the prompt's {input_len} tokens: shorten it or lengthen the prompt"
        )


def sampling_params(new: int, sampling: Mapping[str, Any]) -> "SamplingParams":
    """Sampling parameters for exactly `new` tokens, without detokenising."""
    from trtllm_jax import SamplingParams

    return SamplingParams(max_tokens=new, end_id=-1, ignore_eos=True, detokenize=False, **sampling)


def _generate(llm: "LLM", prompts: list[list[int]], new: int, sampling: Mapping[str, Any]) -> float:
    """Seconds that generating `new` tokens for each prompt takes."""
    params = sampling_params(new, sampling)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    _require_all(min(output.outputs[0].length for output in outputs), new)
    return seconds


async def _stream(llm: "LLM", request: BenchRequest, params: "SamplingParams") -> RequestTimes:
    arrivals: list[float] = []
    submitted = time.perf_counter()
    output = llm.generate_async(request.prompt, params, streaming=True)
    try:
        async for _ in output:
            now = time.perf_counter()
            arrivals += [now] * (output.outputs[0].length - len(arrivals))
    except asyncio.CancelledError:
        output.abort()
        raise
    _require_all(len(arrivals), request.output_tokens)
    return RequestTimes(len(request.prompt), submitted, tuple(arrivals))


def _require_all(generated: int, wanted: int) -> None:
    if generated < wanted:
        raise ValueError(
            f"a request generated {generated} tokens of {wanted}: the engine's sequences are shorter than the workload "
            "needs. Raise max_seq_len or the memory of the KV cache, or shorten prompts or answers"
        )


def _require_room(llm: "LLM", batch: int, length: int) -> None:
    """ValueError if the KV cache cannot hold the whole batch: some rows would wait, and the rates would mislead."""
    capacity = llm.get_kv_cache_capacity()
    page = capacity["tokensPerBlock"]
    needed = batch * -(-length // page) * page
    if needed > capacity["maxNumTokens"]:
        raise ValueError(
            f"batch_size = {batch} with {length} tokens each needs {needed} tokens of KV cache, which holds "
            f"{capacity['maxNumTokens']}: lower batch_size, input_len or output_len, or raise "
            "kv_cache_free_gpu_mem_fraction or kv_cache_max_tokens"
        )
