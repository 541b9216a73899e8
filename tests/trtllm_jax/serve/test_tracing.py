"""Spans as a collector gets them: of answers, of streams, of what failed, and with nobody there."""

import importlib.util
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pydantic import ValidationError

from trtllm_jax import LLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.config import ServerOptions
from trtllm_jax.serve.settings import ServeSettings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collecting() -> Iterator[tuple[str, list[Any]]]:
    """The address of a collector, and its spans."""
    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            spans.extend(span for one in sent.resource_spans for scope in one.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_each_request_is_a_span(tiny_llm: LLM, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100000")  # the end of the server sends them, and nothing before
    with collecting() as (endpoint, spans):
        app = create_app(tiny_llm, ServeSettings(model_names=("tiny",), otlp_traces_endpoint=endpoint))
        with served(app) as url, OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            ask: dict[str, Any] = {"model": "tiny", "prompt": "secret", "max_tokens": 5, "temperature": 0.5}
            ask["extra_body"] = {"ignore_eos": True}
            whole = client.completions.create(
                **ask, extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
            )
            list(client.completions.create(**ask, n=2, stream=True))
            client.embeddings.create(model="tiny", input="x")
            assert httpx.get(f"{url}/health").status_code == 200
        (first,) = [span for span in spans if span.trace_id.hex() == TRACE]
        others = [span for span in spans if span is not first]
    assert {span.name for span in spans} == {"llm_request"}
    assert len(others) == 2
    assert (first.parent_span_id.hex(), first.kind, first.trace_state) == (PARENT, 2, "a=b")
    found = attributes(first)
    expected = {
        "gen_ai.request.id": whole.id, "gen_ai.request.model": "tiny", "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.n": 1, "gen_ai.usage.prompt_tokens": 6,
        "gen_ai.usage.completion_tokens": 5, "http.response.status_code": 200,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert [one.string_value for one in found["gen_ai.response.finish_reasons"].values] == ["length"]
    seconds = (first.end_time_unix_nano - first.start_time_unix_nano) / 1e9
    assert 0 < found["gen_ai.latency.time_in_queue"] <= found["gen_ai.latency.time_to_first_token"] <= seconds
    assert found["gen_ai.latency.e2e"] == pytest.approx(seconds, abs=1e-6)
    assert {attributes(span)["gen_ai.usage.completion_tokens"] for span in others} == {0, 10}
    assert "secret" not in str(spans)


def test_what_failed_is_an_error(tiny_llm: LLM, served: Any) -> None:
    with collecting() as (endpoint, spans):
        settings = ServeSettings(model_names=("tiny",), otlp_traces_endpoint=endpoint, request_timeout=0.01)
        with served(create_app(tiny_llm, settings)) as url:
            body = {"model": "tiny", "prompt": "x", "max_tokens": 150, "n": 8, "ignore_eos": True}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 504
        (span,) = spans
    assert span.status.code == 2
    assert attributes(span)["error.type"] == "504"


@pytest.mark.slow
def test_nobody_waits_for_a_collector_that_is_not_there(tiny_llm: LLM, served: Any) -> None:
    settings = ServeSettings(model_names=("tiny",), otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    with served(create_app(tiny_llm, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        assert client.completions.create(model="tiny", prompt="x", max_tokens=3).usage.completion_tokens
        began = time.monotonic()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("endpoint", "there", "message"),
    [("localhost:4317", True, "OTLP over HTTP"), ("http://localhost:4318", False, r"trtllm-jax\[otel\]")],
)
def test_what_cannot_work_is_said_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, there: bool, message: str
) -> None:
    if not there:
        monkeypatch.setattr("trtllm_jax.serve.tracing.find_spec", lambda name: None)
    assert importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    with pytest.raises((ValueError, ValidationError), match=message):
        ServerOptions(served_model_name=("tiny",), otlp_traces_endpoint=endpoint)
