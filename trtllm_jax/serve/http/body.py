"""A request's body: read within bounds, and JSON in which nothing is ambiguous."""

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from trtllm_jax.serve.http.errors import GONE, ApiError, bad, of_validation
from trtllm_jax.serve.settings import ServeSettings

Model = TypeVar("Model", bound=BaseModel)

HEAVY = 8 << 10
"""Bytes from which on a body is worth a thread: parsing and tokenising it holds up every stream otherwise."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_model(
    request: Request, model: type[Model], settings: ServeSettings, pool: ThreadPoolExecutor
) -> tuple[Model, bool]:
    """The body as a record, and whether it is heavy. ApiError says what is wrong with it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415, f"Content-Type = {kind!r} is not JSON: send application/json", code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "compressed bodies are not read: leave out Content-Encoding", code="unsupported_media_type")
    raw = await _read(request, settings)

    def parse() -> Model:
        return _as_model(parse_json(raw, settings.limits.json_depth), model)

    heavy = len(raw) >= HEAVY
    return (await asyncio.get_running_loop().run_in_executor(pool, parse) if heavy else parse()), heavy


async def _read(request: Request, settings: ServeSettings) -> bytes:
    """The bytes, as far as they are not too many. What a header says of their number is only a reason to refuse."""
    most = settings.limits.body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > most):
        raise _too_large(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {settings.body_timeout:g} s",
            code="timeout",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ApiError(GONE, "the client left") from None
    return b"".join(parts)


def _too_large(most: int) -> ApiError:
    # The rest of the body is not read, so nothing else can come over this connection.
    return ApiError(
        413, f"the body has more than {most} bytes: send less", code="body_too_large", headers={"Connection": "close"}
    )


def parse_json(raw: bytes, depth: int) -> Any:
    """The value, where every reader would find the same: no repeated names, no NaN, no half characters."""
    try:
        text = raw.decode()
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant, parse_float=_finite)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _no_json(f"it is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise _no_json("a \\u escape is half of a surrogate pair") from None
    except RecursionError:
        raise _no_json(f"it is nested more than {depth} deep") from None
    except json.JSONDecodeError as error:
        raise _no_json(f"{error.msg} at character {error.pos}") from None
    except ValueError as error:  # ours, and Python's for numbers of thousands of digits
        raise _no_json(str(error)) from None
    if not shallow(value, depth):
        raise _no_json(f"it is nested more than {depth} deep")
    return value


def shallow(value: Any, depth: int) -> bool:
    """Whether arrays and objects lie at most `depth` deep in each other."""
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
        raise bad(None, f"the body is a JSON {type(value).__name__}: send an object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise of_validation(error) from None
    except RecursionError:
        raise _no_json("it is nested too deep") from None


def _no_json(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:80]!r} is given twice in an object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float | int:
    """A number; JSON Schema, and so the server's document, knows 1.0 as an integer."""
    number = float(digits)
    if abs(number) == float("inf"):
        raise ValueError(f"the number {digits[:40]} is too large")
    return int(number) if number.is_integer() and abs(number) < 2**64 else number


def field_size(value: Any, encode: Callable[..., str] = json.dumps) -> int:
    """How many characters a value has as JSON."""
    return len(value) if isinstance(value, str) else len(encode(value, ensure_ascii=False))
