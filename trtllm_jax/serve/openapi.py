"""The OpenAPI document, derived from the endpoints: what each path takes and gives, failures included."""

import inspect
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from trtllm_jax.serve.http.endpoint import Endpoint
from trtllm_jax.serve.protocol.base import ErrorResponse
from trtllm_jax.serve.server import package_version
from trtllm_jax.serve.settings import ServeSettings

_REF_TEMPLATE = "#/components/schemas/{model}"
_PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_ERROR_DESCRIPTIONS = {
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


def openapi_document(endpoints: Sequence[Endpoint], settings: ServeSettings) -> dict[str, Any]:
    """The document of version 3.1 that describes `endpoints`."""
    documented = [endpoint for endpoint in endpoints if endpoint.documented]
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for endpoint in documented:
        operation = _operation(endpoint)
        if settings.api_keys and endpoint.public:
            operation["security"] = []
        paths[_PATH_PARAMETER.sub(r"{\1}", endpoint.path)][endpoint.method.lower()] = operation
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "trtllm_jax", "version": package_version()},
        "paths": paths,
        "components": {"schemas": _schemas(documented, settings.model_names)},
    }
    if settings.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _schemas(endpoints: Sequence[Endpoint], model_names: Sequence[str]) -> dict[str, Any]:
    models = [model for endpoint in endpoints for model in (endpoint.request, endpoint.response, endpoint.event)]
    distinct = dict.fromkeys(model for model in (*models, ErrorResponse) if model is not None)
    _, definitions = models_json_schema([(model, "validation") for model in distinct], ref_template=_REF_TEMPLATE)
    schemas: dict[str, Any] = definitions["$defs"]
    for endpoint in endpoints:
        if endpoint.request is not None:
            schemas[endpoint.request.__name__]["properties"]["model"]["enum"] = list(model_names)
    return schemas


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "description": inspect.getdoc(endpoint.handler),
        "operationId": endpoint.handler.__name__,
    }
    if parameters := _PATH_PARAMETER.findall(endpoint.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
        ]
    if endpoint.request is not None:
        operation["requestBody"] = {"required": True, "content": _json_content(endpoint.request)}
    operation["responses"] = {"200": {"description": "The answer.", "content": _answer_content(endpoint)}}
    for status in endpoint.errors:
        error = {"description": _ERROR_DESCRIPTIONS[status], "content": _json_content(ErrorResponse)}
        operation["responses"][str(status)] = error
    return operation


def _answer_content(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": schema} for kind, schema in (endpoint.content or {}).items()}
    if endpoint.response is not None:
        content |= _json_content(endpoint.response)
    if endpoint.event is not None:
        content["text/event-stream"] = {"itemSchema": _event_schema(endpoint.event)}
    return content


def _json_content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(model)}}


def _event_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a stream's events, whose data is JSON text, and [DONE] in the last one of most streams."""
    event = {"contentMediaType": "application/json", "contentSchema": _reference(model)}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, event]}
    return {"type": "object", "properties": {"data": data}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF_TEMPLATE.format(model=model.__name__)}
