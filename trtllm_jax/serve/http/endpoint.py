"""`Endpoint`: all that is known of one path of the API, for the router, the middleware and the OpenAPI document."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.serve.server import Server

Handler = Callable[[Server, Request], Awaitable[Response]]

BODY_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
"""Statuses with which a request that has a body may fail."""


@dataclass(frozen=True)
class Endpoint:
    """One method of one path.

    Attributes:
        method: the HTTP method.
        path: the path as Starlette's router reads it.
        handler: answers a request; its name is the operation's id, and its docstring the description.
        summary: a few words for the list of operations.
        request: the model of the JSON body, None where there is no body.
        response: the model of the JSON answer, None where `content` describes it.
        event: the model of each event where the answer may be a stream.
        content: JSON schemas of an answer without a model, by media type.
        errors: statuses with which a request may fail.
        public: whether requests need no API key.
        generates: whether the engine works for requests, whose failures are then counted.
        documented: whether the OpenAPI document has it.
    """

    method: str
    path: str
    handler: Handler
    summary: str = ""
    request: type[BaseModel] | None = None
    response: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    content: Mapping[str, Mapping[str, Any]] | None = None
    errors: tuple[int, ...] = (401, 500)
    public: bool = False
    generates: bool = False
    documented: bool = True
