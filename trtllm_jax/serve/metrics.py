"""Prometheus metrics with TensorRT-LLM's names.

With the environment variable PROMETHEUS_MULTIPROC_DIR set before `prometheus_client` is imported, the values of all
processes that share that folder are added up.
"""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from trtllm_jax.requests.outputs import RequestOutput

_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_PER_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip

_TIMES = (
    ("request_queue_time_seconds", "From a request's arrival at the engine to its admission.", _REQUEST_BUCKETS),
    ("time_to_first_token_seconds", "From a request's submission to its first token.", _FIRST_TOKEN_BUCKETS),
    ("time_per_output_token_seconds", "Mean time between a request's tokens.", _PER_TOKEN_BUCKETS),
    ("request_prefill_time_seconds", "From a request's admission to its first token.", _REQUEST_BUCKETS),
    ("request_decode_time_seconds", "From a request's first token to its last.", _REQUEST_BUCKETS),
    ("request_inference_time_seconds", "From a request's admission to its last token.", _REQUEST_BUCKETS),
)

_LABELS = ("model_name", "engine_type")
_MAX_STATS = 1000

_GAUGES: dict[str, tuple[str, str]] = {
    "num_requests_running": ("numActiveRequests", "Sequences that the engine works on."),
    "num_requests_waiting": ("numQueuedRequests", "Sequences that wait for room in the engine."),
    "max_num_active_requests": ("maxNumActiveRequests", "Sequences that the engine works on at most."),
    "iteration_latency_seconds": ("iterLatencyMS", "Time of the engine's last step."),
    "cpu_memory_usage_bytes": ("cpuMemUsage", "Most memory that the engine's process ever had."),
    "num_scheduled_requests": ("inflightBatchingStats.numScheduledRequests", "Sequences in the last step."),
    "num_context_requests": ("inflightBatchingStats.numContextRequests", "Prompts in the last step."),
    "num_generation_requests": ("inflightBatchingStats.numGenRequests", "Answers in the last step."),
    "num_paused_requests": ("inflightBatchingStats.numPausedRequests", "Sequences that had to give up their pages."),
    "kv_cache_hit_rate": ("kvCacheStats.cacheHitRate", "Share of the prompts' blocks that were known already."),
    "kv_cache_max_blocks": ("kvCacheStats.maxNumBlocks", "Blocks of the KV cache."),
    "kv_cache_free_blocks": ("kvCacheStats.freeNumBlocks", "Blocks that nobody holds."),
    "kv_cache_used_blocks": ("kvCacheStats.usedNumBlocks", "Blocks that sequences hold."),
    "kv_cache_tokens_per_block": ("kvCacheStats.tokensPerBlock", "Tokens of one block."),
    "kv_cache_reused_blocks_total": ("kvCacheStats.reusedBlocks", "Blocks that were known already."),
    "kv_cache_missed_blocks_total": ("kvCacheStats.missedBlocks", "Blocks that had to be computed."),
    "num_requests_completed_total": ("numCompletedRequests", "Sequences that the engine completed."),
}


class Metrics:
    """One application's counters, histograms and gauges, and the engine's statistics that nobody has read yet."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model_name, "trtllm_jax")
        self.stats: deque[dict[str, Any]] = deque(maxlen=_MAX_STATS)
        self._finished = self._counter("request_success", "Answers, by how they ended.", "finished_reason")
        self._errors = self._counter("request_error", "Requests that failed, by their status.", "status")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.").labels(*self._labels)
        self._generated = self._counter("generation_tokens", "Generated tokens.").labels(*self._labels)
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From a request to its answer's end.", _REQUEST_BUCKETS
        )
        self._cached = self._counter("prompt_cached_tokens", "Tokens of prompts that the prefix cache had.").labels(
            *self._labels
        )
        self._times = {name: self._histogram(name, text, buckets) for name, text, buckets in _TIMES}
        self._gauges = {path: self._gauge(name, text) for name, (path, text) in _GAUGES.items()}
        self._utilization = self._gauge("kv_cache_utilization", "Share of the KV cache that sequences hold.")

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(f"trtllm_{name}", text, (*_LABELS, *more), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(f"trtllm_{name}", text, _LABELS, registry=self._registry, buckets=buckets)
        return histogram.labels(*self._labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        # All processes ask the same engine: the newest value is the right one.
        gauge = Gauge(f"trtllm_{name}", text, _LABELS, registry=self._registry, multiprocess_mode="mostrecent")
        return gauge.labels(*self._labels)

    def record_success(self, seconds: float, outputs: Sequence[RequestOutput]) -> None:
        """Count a request that was answered in so many seconds."""
        self._whole.observe(seconds)
        for output in outputs:
            self._prompt.inc(len(output.prompt_token_ids))
            self._cached.inc(output.cached_tokens)
            for name, value in _times(output.metrics_dict).items():
                self._times[name].observe(value)
            for one in output.outputs:
                self._finished.labels(*self._labels, one.finish_reason or "cancelled").inc()
                self._generated.inc(one.length)

    def record_error(self, status: int) -> None:
        """Count a generating request that failed."""
        self._errors.labels(*self._labels, str(status)).inc()

    def update(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """Add the engine's newest statistics; the gauges show the last record, and `stats` keeps all until read."""
        self.stats.extend(map(dict, stats))
        if not stats:
            return
        last = stats[-1]
        for path, gauge in self._gauges.items():
            value = _lookup(last, path)
            gauge.set(value / 1e3 if path.endswith("MS") else value)
        most = _lookup(last, "kvCacheStats.maxNumBlocks")
        self._utilization.set(_lookup(last, "kvCacheStats.usedNumBlocks") / most if most else 0.0)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format, of all processes where several share a folder."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        all_processes = CollectorRegistry()
        MultiProcessCollector(all_processes)
        return generate_latest(all_processes)


def _times(times: Mapping[str, float]) -> dict[str, float]:
    """The values of `_TIMES` that follow from a request's own times."""
    queued, first, total, per_token = (times.get(name) for name in ("request_queue_time", "ttft", "e2e", "tpot"))
    values = {
        "request_queue_time_seconds": queued,
        "time_to_first_token_seconds": first,
        "time_per_output_token_seconds": per_token,
        "request_prefill_time_seconds": None if first is None or queued is None else first - queued,
        "request_decode_time_seconds": None if total is None or first is None else total - first,
        "request_inference_time_seconds": None if total is None or queued is None else total - queued,
    }
    return {name: value for name, value in values.items() if value is not None}


def _lookup(stats: Mapping[str, Any], path: str) -> float:
    value: Any = stats
    for name in path.split("."):
        value = value.get(name, {})
    return float(value) if isinstance(value, int | float) else 0.0
