"""OpenTelemetry: a span for each request that reached the engine, which a thread of the SDK sends to a collector.

Names of attributes follow the semantic conventions for generative AI, as TensorRT-LLM and vLLM have them.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from trtllm_jax.requests.outputs import RequestOutput
from trtllm_jax.requests.sampling_params import SamplingParams

SHUTDOWN_TIMEOUT = 5.0
"""Seconds for the last spans to reach the collector."""

_TIMES = {
    "request_queue_time": "gen_ai.latency.time_in_queue",
    "ttft": "gen_ai.latency.time_to_first_token",
    "tpot": "gen_ai.latency.time_per_output_token",
}


def check_available(endpoint: str) -> None:
    """ValueError where spans cannot be sent there."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(
            f"otlp_traces_endpoint = {endpoint!r} is invalid: give the URL of a collector that takes OTLP over HTTP, "
            "such as http://localhost:4318/v1/traces"
        )
    try:
        found = find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ValueError("otlp_traces_endpoint needs OpenTelemetry's SDK: install trtllm-jax[otel], or leave it out")


@dataclass(frozen=True)
class RequestSpan:
    """A finished request.

    Attributes:
        request_id: the answer's id.
        headers: the request's headers, whose `traceparent` and `tracestate` name the trace that it belongs to.
        started: when it came, in seconds of `time.perf_counter`.
        status: the answer's HTTP status.
        params: the sampling parameters, None where nothing was generated.
        outputs: one output a prompt.
    """

    request_id: str
    headers: Mapping[str, str]
    started: float
    status: int
    params: SamplingParams | None
    outputs: Sequence[RequestOutput]


class Tracing:
    """Sends spans to `endpoint`; the SDK's environment variables (OTEL_...) apply. A dead collector costs log lines."""

    def __init__(self, endpoint: str, model: str) -> None:
        check_available(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._model = model
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "trtllm_jax"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("trtllm_jax")

    def export(self, request: RequestSpan) -> None:
        """Send the span of a request that ends now."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        seconds = time.perf_counter() - request.started
        end = time.time_ns()
        span = self._tracer.start_span(
            "llm_request",
            context=TraceContextTextMapPropagator().extract(request.headers),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.request.id": request.request_id,
                "gen_ai.request.model": self._model,
                "gen_ai.response.model": self._model,
                "gen_ai.latency.e2e": seconds,
                "http.response.status_code": request.status,
                **_request_attributes(request.params),
                **_response_attributes(request.outputs),
            },
            start_time=end - int(seconds * 1e9),
        )
        if request.status >= 400:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", str(request.status))
        span.end(end)

    def close(self) -> None:
        """Send the spans that are left, for at most `SHUTDOWN_TIMEOUT` seconds."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(SHUTDOWN_TIMEOUT)


def _request_attributes(params: SamplingParams | None) -> dict[str, Any]:
    if params is None:
        return {}
    named = {name: getattr(params, name) for name in ("max_tokens", "n", "temperature", "top_p", "top_k")}
    return {f"gen_ai.request.{name}": value for name, value in named.items() if value is not None}


def _response_attributes(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    answers = [one for output in outputs for one in output.outputs]
    read, written = sum(len(output.prompt_token_ids) for output in outputs), sum(one.length for one in answers)
    attributes: dict[str, Any] = {
        "gen_ai.usage.prompt_tokens": read,
        "gen_ai.usage.input_tokens": read,
        "gen_ai.usage.completion_tokens": written,
        "gen_ai.usage.output_tokens": written,
        "gen_ai.usage.cached_tokens": sum(output.cached_tokens for output in outputs),
        "gen_ai.usage.num_sequences": len(answers),
        "gen_ai.response.finish_reasons": [one.finish_reason or "cancelled" for one in answers],
    }
    times = [output.metrics_dict for output in outputs]
    for name, attribute in _TIMES.items():
        known = [each[name] for each in times if name in each]
        if known:
            # Of several prompts the slowest one counts, because the client waited for it.
            attributes[attribute] = max(known)
    return attributes
