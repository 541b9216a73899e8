"""`RequestMiddleware`: a request's id, its API key, its line in the log, and the answer to unexpected failures."""

import hmac
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trtllm_jax.logger import logger
from trtllm_jax.serve.http.endpoint import Endpoint
from trtllm_jax.serve.http.errors import ApiError, as_api_error
from trtllm_jax.serve.server import Server

_VALID_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestMiddleware:
    """ASGI middleware around the whole application; its log lines name sizes, times and ids, and never texts."""

    def __init__(self, app: ASGIApp, server: Server, endpoints: Sequence[Endpoint]) -> None:
        self._app = app
        self._server = server
        self._public = frozenset(endpoint.path for endpoint in endpoints if endpoint.public)
        self._generating = frozenset(endpoint.path for endpoint in endpoints if endpoint.generates)
        self._keys = [key.encode() for key in server.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and answer it where that fails."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        log_fields: dict[str, Any] = {}
        scope["trtllm_jax.log_fields"] = log_fields
        scope["trtllm_jax.request_id"] = request_id.decode()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        try:
            if self._keys and scope["path"] not in self._public:
                self._check_key(headers.get(b"authorization", b""))
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # the answer has begun, and nothing else can be sent
                self._server.log_failure(scope, error)
            else:
                await self._error(scope, error).response()(scope, receive, send_with_id)
        finally:
            status = log_fields.pop("status", status)
            if status >= 400 and scope["path"] in self._generating:
                self._server.metrics.record_error(status)
            _log(scope, status, time.perf_counter() - started, log_fields)

    def _error(self, scope: Scope, error: Exception) -> ApiError:
        known = as_api_error(error, self._server.settings.retry_after)
        if known is not None:
            return known
        self._server.log_failure(scope, error)
        return ApiError(500, f"the server failed at request {scope['trtllm_jax.request_id']}; its log has the cause")

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        # Every key is compared, so that the time taken says nothing about any of them.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _log(scope: Scope, status: int, seconds: float, fields: Mapping[str, Any]) -> None:
    line = {
        "request": scope["trtllm_jax.request_id"],
        "method": scope["method"],
        "path": re.sub(r"[^\x21-\x7e]", "?", scope["path"])[:200],
        "status": status,
        "seconds": f"{seconds:.3f}",
        **fields,
    }
    logger.info(" ".join(f"{name}={value}" for name, value in line.items()))
