"""The times of streamed requests, as frozen records, and the figures derived from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Distribution:
    """Mean, percentiles (interpolated linearly) and extremes of some values, in their unit."""

    avg: float
    p50: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """The distribution of `values`; None if there are none."""
        if not len(values):
            return None
        array = np.asarray(values, np.float64)
        p50, p90, p95, p99 = np.percentile(array, (50, 90, 95, 99)).tolist()
        return cls(float(array.mean()), p50, p90, p95, p99, float(array.min()), float(array.max()))

    def record(self) -> dict[str, float]:
        """The values by name."""
        return asdict(self)


@dataclass(frozen=True)
class RequestTimes:
    """When one request was submitted and when its tokens arrived, in seconds of one clock.

    `tokens` is their number if `arrivals` does not have a time for each of them.
    """

    input_tokens: int
    submitted: float
    arrivals: tuple[float, ...]
    tokens: int | None = None

    @property
    def output_tokens(self) -> int:
        """The number of generated tokens."""
        return len(self.arrivals) if self.tokens is None else self.tokens

    @property
    def first_token_s(self) -> float:
        """Time to first token (TTFT): from the submit call to the token's arrival at the caller."""
        return self.arrivals[0] - self.submitted

    @property
    def latency_s(self) -> float:
        """From the submit call to the arrival of the last token."""
        return self.arrivals[-1] - self.submitted

    @property
    def gaps_s(self) -> list[float]:
        """Times between consecutive arrivals (ITL); 0 for tokens that arrive together, if each has a time."""
        return np.diff(self.arrivals).tolist()

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first (TPOT); None for a single token, or if all arrived at once."""
        if self.output_tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.latency_s - self.first_token_s) / (self.output_tokens - 1)


@dataclass(frozen=True)
class RequestsResult:
    """Streamed requests that ran together.

    Attributes:
        requests: their times, in the order of submission.
        devices: how many devices served them.
        concurrency: most requests in flight; None for no bound.
        request_rate: arrivals per second; None for all at once.
        cached_prefix: tokens at the start of every prompt that were in the prefix cache.
    """

    requests: tuple[RequestTimes, ...]
    devices: int = 1
    concurrency: int | None = None
    request_rate: float | None = None
    cached_prefix: int = 0

    @cached_property
    def seconds(self) -> float:
        """From the first submit call to the arrival of the last token."""
        return max(one.arrivals[-1] for one in self.requests) - min(one.submitted for one in self.requests)

    @cached_property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(one.input_tokens for one in self.requests)

    @cached_property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return sum(one.output_tokens for one in self.requests)

    @property
    def name(self) -> str:
        """The label of this point of a sweep: its concurrency and request rate."""
        bound = str(self.concurrency or "")
        rate = f"{self.request_rate:g}/s" if self.request_rate else ""
        return ", ".join(filter(None, (bound, rate)))

    @property
    def throughputs(self) -> dict[str, float]:
        """Throughputs by TensorRT-LLM's names, in its units; the one per user is the mean over requests."""
        rates = [one.output_tokens / one.latency_s for one in self.requests]
        return {
            "Request Throughput (req/sec)": len(self.requests) / self.seconds,
            "Total Output Throughput (tokens/sec)": self.output_tokens / self.seconds,
            "Total Token Throughput (tokens/sec)": (self.input_tokens + self.output_tokens) / self.seconds,
            "Per User Output Throughput (tps/user)": float(np.mean(rates)),
            "Per GPU Output Throughput (tps/gpu)": self.output_tokens / self.seconds / self.devices,
            "Total Latency (ms)": self.seconds * 1e3,
        }

    @property
    def latencies(self) -> dict[str, Distribution | None]:
        """Distributions over requests, and over all gaps, in milliseconds."""
        per_token = [one.per_token_s for one in self.requests if one.per_token_s is not None]
        seconds = {
            "TTFT": [one.first_token_s for one in self.requests],
            "TPOT": per_token,
            "ITL": [gap for one in self.requests for gap in one.gaps_s],
            "E2E Latency": [one.latency_s for one in self.requests],
        }
        return {name: Distribution.of([value * 1e3 for value in values]) for name, values in seconds.items()}

    def record(self) -> dict[str, Any]:
        """Figures, ready for JSON."""
        return {
            "kind": "requests",
            "num_requests": len(self.requests),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "concurrency": self.concurrency,
            "request_rate": self.request_rate,
            "cached_prefix": self.cached_prefix,
            "devices": self.devices,
            **self.throughputs,
            **{f"{name} (ms)": values and values.record() for name, values in self.latencies.items()},
        }
