"""`create_app`: the HTTP application over an `LLM`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.serve.chat import endpoint as chat
from trtllm_jax.serve.completions import endpoint as completions
from trtllm_jax.serve.embeddings import endpoint as embeddings
from trtllm_jax.serve.http.endpoint import Endpoint
from trtllm_jax.serve.http.errors import ApiError
from trtllm_jax.serve.http.json_response import as_json
from trtllm_jax.serve.http.middleware import RequestMiddleware
from trtllm_jax.serve.metrics import Metrics
from trtllm_jax.serve.openapi import openapi_document
from trtllm_jax.serve.responses import endpoint as responses
from trtllm_jax.serve.scoring import endpoint as scoring
from trtllm_jax.serve.server import Server
from trtllm_jax.serve.settings import ServeSettings
from trtllm_jax.serve.system import page, status, tokens

ENDPOINTS: tuple[Endpoint, ...] = (
    *completions.ENDPOINTS,
    *chat.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *scoring.ENDPOINTS,
    *responses.ENDPOINTS,
    *tokens.ENDPOINTS,
    *status.ENDPOINTS,
    *page.ENDPOINTS,
)


def create_app(llm: BaseLLM, settings: ServeSettings) -> Starlette:
    """OpenAI's HTTP API for `llm`, which the caller shuts down; `app.state.server` is the `Server`.

    Raises:
        ValueError: a parser's name is unknown.
    """
    server = Server(llm, settings, Metrics(settings.model_names[0]))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        server.close()

    @cache
    def document() -> bytes:
        return as_json(openapi_document(ENDPOINTS, settings))

    async def openapi(request: Request) -> Response:
        return Response(document(), media_type="application/json")

    app = Starlette(
        routes=[*(_route(server, endpoint) for endpoint in ENDPOINTS), Route("/openapi.json", openapi)],
        middleware=[Middleware(RequestMiddleware, server=server, endpoints=ENDPOINTS)],
        exception_handlers={HTTPException: _routing_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app


class _Handler:
    """An endpoint's handler as the ASGI application of its route.

    Starlette wraps a plain function in one more exception handler, and the middleware answers all failures here.
    """

    def __init__(self, server: Server, endpoint: Endpoint) -> None:
        self._server = server
        self._handler = endpoint.handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handler(self._server, Request(scope, receive, send))
        await response(scope, receive, send)


def _route(server: Server, endpoint: Endpoint) -> Route:
    route = Route(endpoint.path, _Handler(server, endpoint), name=endpoint.handler.__name__)
    # Named to the constructor, GET would bring HEAD: a request for headers alone would clear the statistics.
    route.methods = {endpoint.method}
    return route


async def _routing_error(request: Request, error: Exception) -> Response:
    """The answer to a request that no route takes: its path or its method is unknown."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        headers = {"Allow": ", ".join(_allowed_methods(request))}
        return ApiError(405, f"{request.method} is not a method of {path!r}", headers=headers).response()
    return ApiError(404, f"there is no {path!r} here: see /openapi.json for what there is").response()


def _allowed_methods(request: Request) -> list[str]:
    """The methods of all routes of a path; Starlette itself names those of the first one only."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
    return sorted({method for route in routes for method in route.methods or ()})
