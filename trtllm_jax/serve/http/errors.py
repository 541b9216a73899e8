"""Failures as OpenAI's clients know them: a status and {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from trtllm_jax.common.errors import EngineBusyError, EngineDeadError, RequestError

GONE = 499
"""Nobody reads an answer with this status: its client left."""

_LONGEST_MESSAGE = 2000
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_FIELD = re.compile(
    r"SamplingParams\.(\w+)"
    r"|((?:messages|tools|tool_choice|documents|chat_template\w*|continue_final_message)(?:\.\w+|\[\d+\])*)"
)
_TAG = re.compile(r"\W|^(?:str|int|float|bool|dict|list|nullable|literal|none)$|^[A-Z]")
_RENAMED = {"embedding_bias": "logit_bias", "guided_decoding": "response_format", "prompt_token_ids": "prompt"}


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: HTTP's.
        message: for a person.
        param: the field that is wrong, if one is.
        code: for a program, if there is one.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON."""
        message = self.message.encode(errors="backslashreplace").decode()
        param = None if self.param is None else self.param.encode(errors="backslashreplace").decode()
        kind = _TYPES.get(self.status, "invalid_request_error")
        return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": self.code}})

    def response(self) -> Response:
        """The error as a whole answer."""
        return Response(self.body(), self.status, self.headers, "application/json")


def bad(param: str | None, message: str) -> ApiError:
    """A request that is wrong; `message` says how it could be right."""
    return ApiError(400, message, param=param, code="invalid_value")


def as_api_error(error: BaseException, retry_after: int) -> ApiError | None:
    """What a client is told of a failure; None for one that is nobody's business but ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusyError):
        return ApiError(429, str(error), code="engine_busy", headers={"Retry-After": str(retry_after)})
    if isinstance(error, EngineDeadError):
        return unavailable("the engine failed; the server is about to end", retry_after)
    if isinstance(error, RequestError):
        return _blaming(error)
    if isinstance(error, RuntimeError) and str(error) == "LLM is shutting down":
        return unavailable("the server is shutting down", retry_after)
    return None


@contextmanager
def checking() -> Iterator[None]:
    """What is done in here with a request's fields fails because they are wrong; elsewhere a ValueError is ours."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise _blaming(error) from error


def _blaming(error: ValueError | TypeError) -> ApiError:
    message = str(error)
    if message.startswith("GuidedDecodingParams"):
        return bad("response_format", message)
    named = _FIELD.match(message)
    name = named and (named[1] or named[2])
    return bad(_RENAMED.get(name, name) if name else "prompt", message)


def unavailable(message: str, retry_after: int) -> ApiError:
    """A server that cannot answer, while another may."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(retry_after)})


def of_validation(error: ValidationError) -> ApiError:
    """The fault of a request's fields that got furthest into them: a union reports every alternative."""
    problems = error.errors(include_url=False, include_context=False)
    depth = max(len(_path(problem)) for problem in problems)
    problem = next(problem for problem in problems if len(_path(problem)) == depth)
    param = _named(_path(problem))
    if problem["type"] == "extra_forbidden":
        return bad(param, f"{param} is not a field of this request: leave it out")
    if problem["type"] == "missing":
        return bad(param, f"{param} is missing")
    same = [one["msg"] for one in problems if _path(one) == _path(problem)]
    message = " or ".join(dict.fromkeys(_lower(text) for text in same))
    return bad(param, f"{param} = {_shown(problem['input'])} is invalid: {message}")


def _path(problem: ErrorDetails) -> tuple[int | str, ...]:
    """Where it is in the request, without the names of a union's alternatives."""
    first, *rest = problem["loc"] or ("body",)
    return (first, *(part for part in rest if isinstance(part, int) or not _TAG.search(part)))


def _named(path: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _lower(text: str) -> str:
    text = text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
