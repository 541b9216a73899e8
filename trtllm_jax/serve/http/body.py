"""A request's body: read within limits, and parsed as JSON in which nothing is ambiguous."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from trtllm_jax.serve.http.errors import CLIENT_CLOSED_REQUEST, ApiError, bad_request, from_validation_error
from trtllm_jax.serve.server import Server
from trtllm_jax.serve.settings import ServeSettings

Model = TypeVar("Model", bound=BaseModel)

LARGE_BODY = 8 << 10
"""Bytes of a body that is parsed and tokenised in a thread, because all streams would wait for it otherwise."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_model(server: Server, request: Request, model: type[Model]) -> tuple[Model, bool]:
    """The body as a `model`, and whether it is large; ApiError says what is wrong with it."""
    settings = server.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415, f"Content-Type = {kind!r} is not JSON: send application/json", code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "compressed bodies are not read: leave out Content-Encoding", code="unsupported_media_type")
    raw = await _read_bytes(request, settings)

    def parse() -> Model:
        return _as_model(parse_json(raw, settings.limits.json_depth), model)

    large = len(raw) >= LARGE_BODY
    return (await asyncio.get_running_loop().run_in_executor(server.pool, parse) if large else parse()), large


async def _read_bytes(request: Request, settings: ServeSettings) -> bytes:
    """The bytes, counted while they come; Content-Length can only have them refused earlier."""
    limit = settings.limits.body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
        raise _too_large(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {settings.body_timeout:g} s",
            code="timeout",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client left") from None
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    # The rest of the body stays unread, so no other request can come over this connection.
    return ApiError(
        413, f"the body has more than {limit} bytes: send less", code="body_too_large", headers={"Connection": "close"}
    )


def parse_json(raw: bytes, depth: int) -> Any:
    """The value of JSON that all parsers read alike: without repeated names, NaN and lone surrogates."""
    try:
        text = raw.decode()
        value = json.loads(
            text, object_pairs_hook=_reject_duplicate_names, parse_constant=_reject_constant, parse_float=_parse_float
        )
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _invalid_json(f"it is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise _invalid_json("a \\u escape is half of a surrogate pair") from None
    except RecursionError:
        raise _invalid_json(f"it is nested more than {depth} deep") from None
    except json.JSONDecodeError as error:
        raise _invalid_json(f"{error.msg} at character {error.pos}") from None
    except ValueError as error:  # from the hooks, and from Python for numbers of thousands of digits
        raise _invalid_json(str(error)) from None
    if not nested_within(value, depth):
        raise _invalid_json(f"it is nested more than {depth} deep")
    return value


def nested_within(value: Any, depth: int) -> bool:
    """Whether arrays and objects are nested at most `depth` deep."""
    level = [value] if isinstance(value, list | dict) else []
    while level and depth > 0:
        depth -= 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
    return not level


def _as_model(value: Any, model: type[Model]) -> Model:
    if not isinstance(value, dict):
        raise bad_request(None, f"the body is a JSON {type(value).__name__}: send an object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation_error(error) from None
    except RecursionError:
        raise _invalid_json("it is nested too deep") from None


def _invalid_json(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def _reject_duplicate_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:80]!r} is given twice in an object")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _parse_float(digits: str) -> float | int:
    """A number, which is an integer where it is whole: JSON Schema takes 1.0 for an integer."""
    number = float(digits)
    if abs(number) == float("inf"):
        raise ValueError(f"the number {digits[:40]} is too large")
    return int(number) if number.is_integer() and abs(number) < 2**64 else number


def json_length(value: Any, encode: Callable[..., str] = json.dumps) -> int:
    """The number of characters of a value as JSON."""
    return len(value) if isinstance(value, str) else len(encode(value, ensure_ascii=False))
