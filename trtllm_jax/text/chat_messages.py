"""Messages in the form of OpenAI's API, validated."""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints.error_text import short_repr

_CONTENT_IS_OPTIONAL = ("assistant", "tool")
"""Roles whose messages need no content."""


def read_messages(where: str, conversation: Sequence[Any]) -> list[dict[str, Any]]:
    """The validated messages: the content of each is a text or a list of texts, and no field is None.

    ValueError names the field of ``where`` that is wrong, its value and the remedy.
    """
    return [_message(f"{where}[{i}]", message) for i, message in enumerate(conversation)]


def is_list(value: Any) -> bool:
    """Whether it is a sequence other than a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _message(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f'{where} = {short_repr(given)} is invalid: give a dict with "role" and "content"')
    message = {name: value for name, value in given.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f'{where}.role = {short_repr(role)} is invalid: give a str such as "user"')
    calls = _tool_calls(f"{where}.tool_calls", message.pop("tool_calls", []))
    # The form of calls before OpenAI's API had tools, which templates do not read.
    if (legacy := message.pop("function_call", None)) is not None and not calls:
        calls = [_tool_call(f"{where}.function_call", {"function": legacy}, "")]
        calls[0]["id"] = _legacy_id(calls[0]["function"]["name"])
    if role == "function":
        message["role"] = role = "tool"
        message.setdefault("tool_call_id", _legacy_id(message.get("name", "")))
    if "content" not in message and role not in _CONTENT_IS_OPTIONAL:
        raise ValueError(f"{where}.content is missing: give a str, or a list of text parts")
    content = _content(f"{where}.content", message.get("content", ""))
    if (refusal := message.pop("refusal", None)) is not None:
        content = _text(f"{where}.refusal", refusal) if not content else [*texts_of(content), refusal]
    return {**message, "content": content, **({"tool_calls": calls} if calls else {})}


def _legacy_id(name: str) -> str:
    return f"call_{name}"


def _content(where: str, content: Any) -> str | list[str]:
    if isinstance(content, str):
        return content
    if not is_list(content):
        raise ValueError(f"{where} = {short_repr(content)} is invalid: give a str, or a list of text parts")
    texts = [_part_text(f"{where}[{i}]", part) for i, part in enumerate(content)]
    return texts if any(texts) else ""


def _part_text(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise ValueError(f'{where} = {short_repr(part)} is invalid: give {{"type": "text", "text": ...}}')
    if kind not in ("text", "refusal"):
        raise ValueError(f'{where}.type = {kind!r} is not available in this release: use parts of type "text"')
    return _text(f"{where}.{kind}", part.get(kind))


def _text(where: str, given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError(f"{where} = {short_repr(given)} is invalid: give a str")
    return given


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not is_list(calls) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f'{where} = {short_repr(calls)} is invalid: give a list of dicts with a "function"')
    return [_tool_call(f"{where}[{i}]", call, ".function") for i, call in enumerate(calls)]


def _tool_call(where: str, call: Mapping[str, Any], inner: str) -> dict[str, Any]:
    """The validated call, whose arguments are an object or a text that is not empty."""
    function = call.get("function")
    where += inner
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where} = {short_repr(function)} is invalid: give a dict with "name" and "arguments"')
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str | Mapping):
        raise ValueError(f"{where}.arguments = {short_repr(arguments)} is invalid: give an object, or JSON text")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}
    given = {name: value for name, value in call.items() if value is not None}
    return {"type": "function", **given, "function": {**function, "arguments": arguments}}


def texts_of(content: str | Sequence[str]) -> Sequence[str]:
    """The texts of a message's content."""
    return [content] if isinstance(content, str) else content
