"""The measurements on a model made of sleeps and a clock that a test sets, where every figure is known."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from trtllm_jax import SamplingParams
from trtllm_jax.commands.bench import measure as bench_measure
from trtllm_jax.commands.bench.measure import measure_batch, measure_first_token, measure_requests
from trtllm_jax.commands.bench.workload import BenchRequest

VOCAB = 1000


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TimedModel:
    """Takes half a second for a prompt and a tenth for each further token; remembers what it was asked."""

    def __init__(self, clock: Clock, longest: int = 99, cache_tokens: int = 1 << 20) -> None:
        self.clock, self.longest, self.cache_tokens = clock, longest, cache_tokens
        self.calls: list[tuple[list[list[int]], SamplingParams]] = []

    def get_kv_cache_capacity(self) -> dict[str, int]:
        return {"tokensPerBlock": 32, "maxNumTokens": self.cache_tokens}

    def generate(self, prompts: list[list[int]], params: SamplingParams, use_tqdm: bool) -> list[Any]:
        self.calls.append((prompts, params))
        self.clock.now += 0.5 + 0.1 * (params.max_tokens - 1)
        length = min(params.max_tokens, self.longest)
        return [SimpleNamespace(outputs=[SimpleNamespace(length=length)]) for _ in prompts]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bench_measure, "time", clock)
    return clock


def test_a_batch(clock: Clock) -> None:
    model: Any = TimedModel(clock)
    result = measure_batch(model, 4, 16, 11, vocab=VOCAB, repeats=2, warmup=1, sampling={"top_k": 5, "seed": 1})
    assert result.first_seconds == pytest.approx((0.5, 0.5))
    assert result.all_seconds == pytest.approx((1.5, 1.5))
    assert result.decode_tokens_per_s == pytest.approx(40)
    assert result.step_s == pytest.approx(0.1)

    assert [params.max_tokens for _, params in model.calls] == [1, 11] * 3
    assert all(params.ignore_eos and params.top_k == 5 for _, params in model.calls)
    prompts = [tuple(prompt) for prompts, _ in model.calls for prompt in prompts]
    assert {len(prompt) for prompt in prompts} == {16}
    assert len(set(prompts)) == 6 * 4  # fresh each time


def test_batches_that_cannot_be_measured(clock: Clock) -> None:
    model: Any = TimedModel(clock, cache_tokens=1024)
    with pytest.raises(ValueError, match="output_len = 1 "):
        measure_batch(model, 1, 8, 1, vocab=VOCAB)
    # 17 tokens take a page of 32.
    with pytest.raises(ValueError, match="batch_size = 33 with 17 tokens each needs 1056 tokens of KV cache"):
        measure_batch(model, 33, 8, 9, vocab=VOCAB)
    assert model.calls == []
    measure_batch(model, 32, 8, 9, vocab=VOCAB)
    with pytest.raises(ValueError, match="generated 3 tokens of 5"):
        measure_batch(TimedModel(clock, longest=3), 1, 8, 5, vocab=VOCAB)  # type: ignore[arg-type]


@pytest.mark.parametrize("cached", [0, 6])
def test_first_tokens_share_the_cached_prefix_only(clock: Clock, cached: int) -> None:
    model: Any = TimedModel(clock)
    result = measure_first_token(model, 10, vocab=1 << 30, cached=cached, repeats=4)
    assert result.seconds == pytest.approx((0.5,) * 4)
    prompts = [prompt for (prompt,), _ in model.calls]
    assert {len(prompt) for prompt in prompts} == {10}
    assert len({tuple(prompt[:cached]) for prompt in prompts}) == 1
    assert len({prompt[cached] for prompt in prompts}) == len(prompts)
    with pytest.raises(ValueError, match="cached_prefix = 10 is not below"):
        measure_first_token(model, 10, vocab=VOCAB, cached=10)


class StreamingModel:
    """Streams its tokens in pairs after the first, a few milliseconds apart, and counts who is served at once."""

    def __init__(self, missing: int = 0) -> None:
        self.missing, self.served, self.most, self.started = missing, 0, 0, 0

    def generate_async(self, prompt: list[int], params: SamplingParams, streaming: bool) -> AsyncIterator[Any]:
        assert streaming
        self.started += 1
        return self._stream(params.max_tokens - self.missing)

    async def _stream(self, tokens: int) -> AsyncIterator[Any]:
        self.served += 1
        self.most = max(self.most, self.served)
        output = SimpleNamespace(outputs=[SimpleNamespace(length=0)])
        try:
            while output.outputs[0].length < tokens:
                await asyncio.sleep(0.005)
                output.outputs[0].length = min(
                    output.outputs[0].length + (2 if output.outputs[0].length else 1), tokens
                )
                yield output
        finally:
            self.served -= 1


class _Output:
    """An async iterator with the `outputs` and `abort` that a RequestOutput has."""

    def __init__(self, stream: AsyncIterator[Any]) -> None:
        self._stream = stream
        self.outputs: list[Any] = []

    def __aiter__(self) -> "_Output":
        return self

    async def __anext__(self) -> "_Output":
        self.outputs = (await anext(self._stream)).outputs
        return self

    def abort(self) -> None:
        raise AssertionError("nothing here is cancelled")


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> StreamingModel:
    model = StreamingModel()
    plain = model.generate_async
    monkeypatch.setattr(model, "generate_async", lambda *args, **kwargs: _Output(plain(*args, **kwargs)))
    return model


REQUESTS = [BenchRequest([1, 2, 3], new) for new in (1, 2, 5, 4, 3, 5)]


@pytest.mark.parametrize(("bound", "most"), [(1, 1), (2, 2), (None, 6)])
def test_streams_in_flight(streaming: Any, bound: int | None, most: int) -> None:
    done: list[int] = []
    result = measure_requests(streaming, REQUESTS, concurrency=bound, progress=lambda: done.append(1))
    assert streaming.most == most
    assert len(done) == 6
    assert sorted(len(one.arrivals) for one in result.requests) == [1, 2, 3, 4, 5, 5]
    assert (result.input_tokens, result.output_tokens, result.concurrency) == (18, 20, bound)
    submitted = [one.submitted for one in result.requests]
    assert submitted == sorted(submitted)
    for one in result.requests:
        assert one.first_token_s >= 0.005
        # 1, 3, 5: tokens that come together have the same time.
        assert len(set(one.arrivals)) == 1 + len(one.arrivals) // 2
        if len(one.arrivals) == 5:
            assert one.gaps_s[1] == one.gaps_s[3] == 0
            assert min(one.gaps_s[0], one.gaps_s[2]) >= 0.004


def test_arrivals_are_spread(streaming: Any) -> None:
    result = measure_requests(streaming, REQUESTS, request_rate=100.0, seed=1)
    submitted = [one.submitted - result.requests[0].submitted for one in result.requests]
    expected = bench_measure.arrival_times(6, 100.0, seed=1)
    assert all(at >= due - 1e-3 for at, due in zip(submitted, expected, strict=True))
    assert result.seconds >= expected[-1]


def test_an_answer_cut_short_is_an_error(streaming: Any) -> None:
    streaming.missing = 1
    with pytest.raises(ValueError, match="generated 4 tokens of 5"):
        measure_requests(streaming, [BenchRequest([1], 5)])
