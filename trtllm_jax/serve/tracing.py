"""OpenTelemetry: a span for each request that reached the engine, sent to a collector from a thread of the SDK's.

Names of attributes follow the semantic conventions for generative AI, as TensorRT-LLM and vLLM have them.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from trtllm_jax.requests.outputs import RequestOutput
from trtllm_jax.requests.sampling_params import SamplingParams

CLOSING = 5.0
"""Seconds that the last spans have to reach the collector."""

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

    def record(
        self,
        number: str,
        headers: Mapping[str, str],
        began: float,
        status: int,
        params: SamplingParams | None,
        outputs: Sequence[RequestOutput],
    ) -> None:
        """A request ended now, with this HTTP status.

        Args:
            number: its id.
            headers: its own, of which `traceparent` and `tracestate` say what it is a part of.
            began: in `time.perf_counter`'s seconds.
            status: of the answer.
            params: what was asked for, None where nothing was generated.
            outputs: one a prompt.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        seconds = time.perf_counter() - began
        end = time.time_ns()
        span = self._tracer.start_span(
            "llm_request",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.request.id": number,
                "gen_ai.request.model": self._model,
                "gen_ai.response.model": self._model,
                "gen_ai.latency.e2e": seconds,
                "http.response.status_code": status,
                **_asked(params),
                **_came(outputs),
            },
            start_time=end - int(seconds * 1e9),
        )
        if status >= 400:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", str(status))
        span.end(end)

    def close(self) -> None:
        """Send what is left, if that takes no longer than `CLOSING` seconds."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSING)


def _asked(params: SamplingParams | None) -> dict[str, Any]:
    if params is None:
        return {}
    named = {name: getattr(params, name) for name in ("max_tokens", "n", "temperature", "top_p", "top_k")}
    return {f"gen_ai.request.{name}": value for name, value in named.items() if value is not None}


def _came(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    answers = [one for output in outputs for one in output.outputs]
    read, written = sum(len(output.prompt_token_ids) for output in outputs), sum(one.length for one in answers)
    found: dict[str, Any] = {
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
            # Of several prompts the slowest: that is what whoever asked had to wait for.
            found[attribute] = max(known)
    return found
