"""The endpoints of a server's state: health, models, version, statistics."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.serve.http.endpoint import Endpoint
from trtllm_jax.serve.http.errors import service_unavailable
from trtllm_jax.serve.http.json_response import json_response
from trtllm_jax.serve.http.tracker import RequestTracker
from trtllm_jax.serve.protocol.base import ModelCard, ModelList
from trtllm_jax.serve.server import Server, package_version

_PROBE_TIMEOUT = 60.0


async def health(server: Server, request: Request) -> Response:
    """200 while the server takes requests, else 503."""
    server.check_ready()
    return Response()


async def health_generate(server: Server, request: Request) -> Response:
    """200 once the engine has generated a token, or encoded one where it generates none; 503 where it does not."""
    tracker = RequestTracker(server, request, "health-")
    one = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    llm = server.llm
    generates = llm.facts.task == "generate"
    tracker.outputs = [llm.generate_async([0], one) if generates else llm.encode_async([0])]
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT), tracker.abort_on_disconnect(request.receive):
            await tracker.outputs[0].aresult()
            tracker.raise_if_aborted()
    except TimeoutError:
        retry = server.settings.retry_after
        raise service_unavailable(f"the engine gave no token in {_PROBE_TIMEOUT:g} s", retry) from None
    return Response()


async def get_version(server: Server, request: Request) -> Response:
    """The package's version."""
    return json_response({"version": package_version()})


async def list_models(server: Server, request: Request) -> Response:
    """The names of the model."""
    return json_response({"object": "list", "data": [_card(server, name) for name in server.settings.model_names]})


async def retrieve_model(server: Server, request: Request) -> Response:
    """One of them."""
    return json_response(_card(server, server.check_model(request.path_params["model"])))


async def get_statistics(server: Server, request: Request) -> Response:
    """The engine's statistics since anybody read them last, one record a step."""
    await update_metrics(server)
    stats = list(server.metrics.stats)
    server.metrics.stats.clear()
    return json_response(stats)


async def get_prometheus_metrics(server: Server, request: Request) -> Response:
    """The metrics in Prometheus' text form."""
    await update_metrics(server)
    return Response(server.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def get_kv_cache_events(server: Server, request: Request) -> Response:
    """The prefix cache's events since anybody read them last."""
    return json_response(await server.llm.get_kv_cache_events_async())


async def update_metrics(server: Server) -> None:
    """Add the engine's newest statistics to the metrics; an engine that has failed has none."""
    if server.llm.failure is None:
        server.metrics.update(await server.llm.get_stats_async())


def _card(server: Server, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "trtllm_jax",
        "max_model_len": server.llm.facts.max_seq_len,
    }


_RECORDS = {"type": "array", "items": {"type": "object"}}
ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models, "List the model's names", response=ModelList),
    Endpoint(
        "GET",
        "/v1/models/{model:path}",
        retrieve_model,
        "Retrieve one name of the model",
        response=ModelCard,
        errors=(401, 404, 500),
    ),
    Endpoint("GET", "/health", health, "Whether requests are taken", errors=(503,), public=True),
    Endpoint("GET", "/health_generate", health_generate, "Whether the engine computes", errors=(401, 500, 503, 504)),
    Endpoint(
        "GET",
        "/version",
        get_version,
        "The package's version",
        content={"application/json": {"type": "object", "required": ["version"]}},
    ),
    Endpoint("GET", "/metrics", get_statistics, "The engine's statistics", content={"application/json": _RECORDS}),
    Endpoint(
        "GET",
        "/prometheus/metrics",
        get_prometheus_metrics,
        "Metrics for Prometheus",
        content={"text/plain": {"type": "string"}},
    ),
    Endpoint(
        "POST",
        "/kv_cache_events",
        get_kv_cache_events,
        "The prefix cache's events",
        content={"application/json": _RECORDS},
    ),
)
