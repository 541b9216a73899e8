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

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that closed the connection; nobody reads such an answer."""

_MAX_MESSAGE = 2000
_ERROR_TYPES = {
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
    r"|(prompt\.(?:prompt|text_pair))"
    r"|((?:messages|tools|tool_choice|documents|chat_template\w*|continue_final_message|truncate_prompt_tokens)"
    r"(?:\.\w+|\[\d+\])*)"
)
_UNION_TAG = re.compile(r"\W|^(?:str|int|float|bool|dict|list|nullable|literal|none)$|^[A-Z]")
_API_NAMES = {"embedding_bias": "logit_bias", "guided_decoding": "response_format", "prompt_token_ids": "prompt"}


class ApiError(Exception):
    """A failure as the client gets it.

    Attributes:
        status: the HTTP status.
        message: the explanation for a person.
        param: the wrong field, if it is one.
        code: the kind of failure for a program, if there is one.
        headers: further headers of the answer.
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
        self.message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON."""
        message = self.message.encode(errors="backslashreplace").decode()
        param = None if self.param is None else self.param.encode(errors="backslashreplace").decode()
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error")
        return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": self.code}})

    def response(self) -> Response:
        """The error as a whole answer."""
        return Response(self.body(), self.status, self.headers, "application/json")


def bad_request(param: str | None, message: str) -> ApiError:
    """The error of a request with a wrong field; `message` says what would be right."""
    return ApiError(400, message, param=param, code="invalid_value")


def as_api_error(error: BaseException, retry_after: int) -> ApiError | None:
    """The error that a client gets for a failure; None for one that only the log explains."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusyError):
        return ApiError(429, str(error), code="engine_busy", headers={"Retry-After": str(retry_after)})
    if isinstance(error, EngineDeadError):
        return service_unavailable("the engine failed; the server is about to end", retry_after)
    if isinstance(error, RequestError):
        return _from_value_error(error)
    if isinstance(error, RuntimeError) and str(error) == "LLM is shutting down":
        return service_unavailable("the server is shutting down", retry_after)
    return None


@contextmanager
def bad_request_on_value_error() -> Iterator[None]:
    """A context in which a ValueError means a wrong field of the request; elsewhere it is the server's own failure."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise _from_value_error(error) from error


@contextmanager
def prompt_errors_name(names: Mapping[str, str]) -> Iterator[None]:
    """A context in which a wrong prompt, or one text of a pair, has the name that the request has for it."""
    try:
        yield
    except ApiError as error:
        name = names.get(error.param or "", error.param)
        if name == error.param:
            raise
        of_ours = error.message.removeprefix(error.param or "")
        message = f"{name}: {error.message}" if of_ours == error.message else f"{name}{of_ours}"
        raise bad_request(name, message) from error


def _from_value_error(error: ValueError | TypeError) -> ApiError:
    message = str(error)
    if message.startswith("GuidedDecodingParams"):
        return bad_request("response_format", message)
    named = _FIELD.match(message)
    name = named and next(filter(None, named.groups()))
    return bad_request(_API_NAMES.get(name, name) if name else "prompt", message)


def service_unavailable(message: str, retry_after: int) -> ApiError:
    """The error of a server that cannot answer while another one may."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(retry_after)})


def from_validation_error(error: ValidationError) -> ApiError:
    """The deepest of pydantic's errors, because a union reports one for every alternative."""
    problems = error.errors(include_url=False, include_context=False)
    depth = max(len(_path(problem)) for problem in problems)
    problem = next(problem for problem in problems if len(_path(problem)) == depth)
    param = _format_path(_path(problem))
    if problem["type"] == "extra_forbidden":
        return bad_request(param, f"{param} is not a field of this request: leave it out")
    if problem["type"] == "missing":
        return bad_request(param, f"{param} is missing")
    if problem["input"] == [] and any(one["type"] == "too_short" for one in problems if _path(one) == _path(problem)):
        return bad_request(param, f"{param} is empty: give at least one entry")
    same = [one["msg"] for one in problems if _path(one) == _path(problem)]
    message = " or ".join(dict.fromkeys(_lower(text) for text in same))
    return bad_request(param, f"{param} = {_format_value(problem['input'])} is invalid: {message}")


def _path(problem: ErrorDetails) -> tuple[int | str, ...]:
    """The path of the field, without the names of a union's alternatives."""
    first, *rest = problem["loc"] or ("body",)
    return (first, *(part for part in rest if isinstance(part, int) or not _UNION_TAG.search(part)))


def _format_path(path: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _lower(text: str) -> str:
    text = text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _format_value(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
