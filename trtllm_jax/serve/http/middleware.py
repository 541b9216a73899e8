"""`RequestMiddleware`: a request's id, its API key, its line in the log, and the answer to unexpected failures."""

import hmac
import re
import time
import uuid
from collections.abc import Sequence
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
        """Answer, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        record: dict[str, Any] = {}
        scope["trtllm_jax.record"] = record
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
            if status:
                self._server.log_failure(scope, error)
            else:
                told = as_api_error(error, self._server.settings.retry_after)
                if told is None:
                    self._server.log_failure(scope, error)
                    told = ApiError(500, f"the server failed at request {request_id.decode()}; its log has the cause")
                await told.response()(scope, receive, send_with_id)
        finally:
            status = record.pop("status", status)
            if status >= 400 and scope["path"] in self._generating:
                self._server.metrics.failed(status)
            facts = {
                "request": request_id.decode(),
                "method": scope["method"],
                "path": _one_word(scope["path"]),
                "status": status,
                "seconds": f"{time.perf_counter() - began:.3f}",
                **record,
            }
            logger.info(" ".join(f"{name}={value}" for name, value in facts.items()))

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        # Every key is compared, so that the time says nothing about any of them.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _one_word(path: str) -> str:
    return re.sub(r"[^\x21-\x7e]", "?", path)[:200]
