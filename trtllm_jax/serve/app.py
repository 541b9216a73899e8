"""`create_app`: the HTTP application over an `LLM`."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.serve.chat import endpoint as chat
from trtllm_jax.serve.completions import endpoint as completions
from trtllm_jax.serve.embeddings import endpoint as embeddings
from trtllm_jax.serve.http.errors import ApiError
from trtllm_jax.serve.http.front import Front
from trtllm_jax.serve.metrics import Metrics
from trtllm_jax.serve.openapi import describe, route_facts
from trtllm_jax.serve.responses import endpoint as responses
from trtllm_jax.serve.server import Server, package_version
from trtllm_jax.serve.settings import ServeSettings
from trtllm_jax.serve.system import page, tokens
from trtllm_jax.serve.system import status as system

Endpoint = Callable[[Server, Request], Awaitable[Response]]

_ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "/v1/completions", completions.answer),
    ("POST", "/v1/chat/completions", chat.answer),
    ("POST", "/v1/embeddings", embeddings.answer),
    ("POST", "/v1/responses", responses.answer),
    ("GET", "/v1/responses/{response_id}", responses.stored),
    ("DELETE", "/v1/responses/{response_id}", responses.delete),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("GET", "/v1/models", system.models),
    ("GET", "/v1/models/{model:path}", system.model),
    ("GET", "/health", system.health),
    ("GET", "/health_generate", system.health_generate),
    ("GET", "/version", system.version),
    ("GET", "/metrics", system.statistics),
    ("GET", "/prometheus/metrics", system.prometheus),
    ("POST", "/kv_cache_events", system.kv_cache_events),
)


_PAGE: tuple[tuple[str, Endpoint], ...] = (("/", page.index), ("/page/{name}", page.part))


def create_app(llm: BaseLLM, settings: ServeSettings) -> FastAPI:
    """OpenAI's HTTP API for `llm`, which stays its owner's to shut down; `app.state.server` is the `Server`.

    Raises:
        ValueError: a parser's name is unknown.
    """
    server = Server(llm, settings, Metrics(settings.model_names[0]))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(
        title="trtllm_jax",
        version=package_version(),
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.server = server
    app.router.route_class = _Route
    for method, path, endpoint in _ROUTES:
        app.add_api_route(path, _bound(server, endpoint), methods=[method], **route_facts(method, path))
    for path, endpoint in _PAGE:
        app.add_api_route(path, _bound(server, endpoint), include_in_schema=False, response_class=Response)
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(Front, server=server)  # which answers all other failures
    describe(app, authenticated=bool(settings.api_keys), model_names=settings.model_names)
    return app


class _Route(APIRoute):
    """A path of FastAPI's document whose function takes the request as it came.

    FastAPI would solve dependencies and keep exit stacks for it, which takes longer than reading most requests.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def _bound(server: Server, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await endpoint(server, request)

    answer.__name__ = f"{endpoint.__module__.rpartition('.')[2]}_{endpoint.__name__}"
    answer.__doc__ = endpoint.__doc__
    return answer


async def _refused(request: Request, error: Exception) -> Response:
    """What the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    known = {
        404: f"there is no {request.url.path[:200]!r} here: see /openapi.json for what there is",
        405: f"{request.method} is not a method of {request.url.path[:200]!r}",
    }
    message = known.get(error.status_code, str(error.detail))
    headers = error.headers if error.status_code != 405 else {"Allow": ", ".join(_allowed(request))}
    return ApiError(error.status_code, message, headers=headers).response()


def _allowed(request: Request) -> list[str]:
    """All methods of a path; the router names those of the first route that has it."""
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    return sorted(
        {name for route in routes if route.matches(request.scope)[0] != Match.NONE for name in route.methods or ()}
    )
