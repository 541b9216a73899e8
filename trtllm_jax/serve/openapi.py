"""The OpenAPI document: what each path takes and gives, failures included."""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from trtllm_jax.serve.protocol.base import ErrorResponse, ModelCard, ModelList
from trtllm_jax.serve.protocol.chat import ChatChunk, ChatRequest, ChatResponse
from trtllm_jax.serve.protocol.completions import CompletionRequest, CompletionResponse
from trtllm_jax.serve.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from trtllm_jax.serve.protocol.responses import DeletedResponse, ResponsesAnswer, ResponsesEvent, ResponsesRequest
from trtllm_jax.serve.system.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

_PATH_PARAMETER = re.compile(r"\{(\w+)")
_REF = "#/components/schemas/{model}"

_FAILURES = {
    400: "A field is wrong.",
    401: "The API key is missing or wrong.",
    404: "The model does not exist.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The engine's queue is full; come again after Retry-After seconds.",
    500: "The server failed.",
    503: "The engine is gone, or the server is about to end.",
    504: "The answer took too long.",
}

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionResponse,
    "/v1/chat/completions": ChatResponse,
    "/v1/embeddings": EmbeddingResponse,
    "/v1/responses": ResponsesAnswer,
    "GET /v1/responses/{response_id}": ResponsesAnswer,
    "DELETE /v1/responses/{response_id}": DeletedResponse,
    "/tokenize": TokenizeResponse,
    "/detokenize": DetokenizeResponse,
    "/v1/models": ModelList,
    "/v1/models/{model:path}": ModelCard,
}
_EVENTS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionResponse,
    "/v1/chat/completions": ChatChunk,
    "/v1/responses": ResponsesEvent,
}
_STATUSES = {
    "/health": (503,),
    "/health_generate": (401, 500, 503, 504),
    "/v1/models/{model:path}": (401, 404, 500),
    "/v1/responses/{response_id}": (400, 401, 404, 500),
}
_OTHERS = (401, 500)
_RECORDS = {"type": "array", "items": {"type": "object"}}
_CONTENTS: dict[str, dict[str, Any]] = {
    "/health": {},
    "/health_generate": {},
    "/version": {"application/json": {"schema": {"type": "object", "required": ["version"]}}},
    "/metrics": {"application/json": {"schema": _RECORDS}},
    "/kv_cache_events": {"application/json": {"schema": _RECORDS}},
    "/prometheus/metrics": {"text/plain": {"schema": {"type": "string"}}},
}


def route_facts(method: str, path: str) -> dict[str, Any]:
    """What FastAPI is told of a path besides its function."""
    statuses = tuple(_FAILURES) if path in _BODIES else _STATUSES.get(path, _OTHERS)
    content = _CONTENTS.get(path)
    if content is None:
        answer = _ANSWERS.get(path) or _ANSWERS[f"{method} {path}"]
        content = {"application/json": {"schema": _ref(answer)}}
        if path in _EVENTS:
            content["text/event-stream"] = {"itemSchema": _event(_EVENTS[path])}
    error = {"application/json": {"schema": _ref(ErrorResponse)}}
    responses: dict[int | str, Any] = {200: {"description": "The answer.", "content": content}}
    responses |= {status: {"description": _FAILURES[status], "content": error} for status in statuses}
    extra: dict[str, Any] = {"responses": {str(status): said for status, said in responses.items()}}
    if path in _BODIES:
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(_BODIES[path])}},
        }
    if found := _PATH_PARAMETER.search(path):
        extra["parameters"] = [{"name": found[1], "in": "path", "required": True, "schema": {"type": "string"}}]
    return {"openapi_extra": extra, "response_class": Response}


def describe(app: FastAPI, authenticated: bool, model_names: Sequence[str]) -> None:
    """Have `app.openapi()` give the whole document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            whole = get_openapi(title=app.title, version=app.version, routes=app.routes)
            models = [*_BODIES.values(), *_ANSWERS.values(), *_EVENTS.values(), ErrorResponse]
            wanted = [(model, "validation") for model in dict.fromkeys(models)]
            _, definitions = models_json_schema(wanted, ref_template=_REF)  # type: ignore[arg-type]
            whole["components"] = {"schemas": definitions["$defs"]}
            for body in _BODIES.values():
                definitions["$defs"][body.__name__]["properties"]["model"]["enum"] = list(model_names)
            if authenticated:
                whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                whole["security"] = [{"key": []}]
                whole["paths"]["/health"]["get"]["security"] = []
            app.openapi_schema = whole
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _event(model: type[BaseModel]) -> dict[str, Any]:
    """Of a stream: JSON as text, but for the last one of most."""
    whole = {"contentMediaType": "application/json", "contentSchema": _ref(model)}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, whole]}
    return {"type": "object", "properties": {"data": data}}
