"""Messages as OpenAI's API has them: what they may be, and how a template's shape takes them."""

import hashlib
import json
import re
import reprlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_jax.text.template_shape import Shape

_MAY_SAY_NOTHING = ("assistant", "tool")


def read_messages(where: str, conversation: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages, checked: content is a text or a list of texts, and nothing is None.

    ValueError names the field of ``where`` that is wrong, its value and the remedy.
    """
    return [_message(f"{where}[{i}]", message) for i, message in enumerate(conversation)]


def in_shape(messages: Sequence[Mapping[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """The messages of `read_messages` as a template of that shape takes them."""
    if shape.results == "user":
        messages = [_told(message) if message["role"] == "tool" else message for message in messages]
    placed = _place_systems(messages, shape)
    if shape.alternating:
        placed = _alternating(placed)
    names = {call.get("id"): call["function"]["name"] for message in placed for call in _calls(message)}
    return [_shaped(message, shape, names) for message in _divided(placed, shape)]


def is_list(value: Any) -> bool:
    """Whether it is a sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def shown(value: Any) -> str:
    """A short form for error messages."""
    return reprlib.repr(value)


def _message(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f'{where} = {shown(given)} is invalid: give a dict with "role" and "content"')
    message = {name: value for name, value in given.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f'{where}.role = {shown(role)} is invalid: give a str such as "user"')
    calls = _tool_calls(f"{where}.tool_calls", message.pop("tool_calls", []))
    # OpenAI's form of calls before there were tools, which templates do not know.
    if (legacy := message.pop("function_call", None)) is not None and not calls:
        calls = [_tool_call(f"{where}.function_call", {"function": legacy}, "")]
        calls[0]["id"] = _legacy_id(calls[0]["function"]["name"])
    if role == "function":
        message["role"] = role = "tool"
        message.setdefault("tool_call_id", _legacy_id(message.get("name", "")))
    if "content" not in message and role not in _MAY_SAY_NOTHING:
        raise ValueError(f"{where}.content is missing: give a str, or a list of text parts")
    content = _content(f"{where}.content", message.get("content", ""))
    if (refusal := message.pop("refusal", None)) is not None:
        content = _text(f"{where}.refusal", refusal) if not content else [*_texts(content), refusal]
    return {**message, "content": content, **({"tool_calls": calls} if calls else {})}


def _legacy_id(name: str) -> str:
    return f"call_{name}"


def _content(where: str, content: Any) -> str | list[str]:
    if isinstance(content, str):
        return content
    if not is_list(content):
        raise ValueError(f"{where} = {shown(content)} is invalid: give a str, or a list of text parts")
    texts = [_of_part(f"{where}[{i}]", part) for i, part in enumerate(content)]
    return texts if any(texts) else ""


def _of_part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise ValueError(f'{where} = {shown(part)} is invalid: give {{"type": "text", "text": ...}}')
    if kind not in ("text", "refusal"):
        raise ValueError(f'{where}.type = {kind!r} is not available in this release: use parts of type "text"')
    return _text(f"{where}.{kind}", part.get(kind))


def _text(where: str, given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError(f"{where} = {shown(given)} is invalid: give a str")
    return given


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not is_list(calls) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f'{where} = {shown(calls)} is invalid: give a list of dicts with a "function"')
    return [_tool_call(f"{where}[{i}]", call, ".function") for i, call in enumerate(calls)]


def _tool_call(where: str, call: Mapping[str, Any], inner: str) -> dict[str, Any]:
    """The call, with arguments that are an object or a text which is not empty."""
    function = call.get("function")
    where += inner
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where} = {shown(function)} is invalid: give a dict with "name" and "arguments"')
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str | Mapping):
        raise ValueError(f"{where}.arguments = {shown(arguments)} is invalid: give an object, or JSON text")
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        arguments = {}
    given = {name: value for name, value in call.items() if value is not None}
    return {"type": "function", **given, "function": {**function, "arguments": arguments}}


def _told(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": result["content"]}


def _place_systems(messages: Sequence[Mapping[str, Any]], shape: Shape) -> list[Mapping[str, Any]]:
    """System messages where the template has them; what it has no place for begins the user's next message."""
    if shape.system == "many":
        return list(messages)
    placed: list[Mapping[str, Any]] = []
    waiting: list[Mapping[str, Any]] = []
    for message in messages:
        if message["role"] == "system" and shape.system == "one" and all(each["role"] == "system" for each in placed):
            placed = [_joined([*placed, message])]
        elif message["role"] == "system":
            waiting.append(message)
        elif message["role"] == "user" and waiting:
            placed.append({**message, "content": _joined([*waiting, message])["content"]})
            waiting = []
        else:
            placed.append(message)
    return [*placed, {**_joined(waiting), "role": "user"}] if waiting else placed


def _alternating(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Turns of user and assistant, the user's first: what follows its like joins it, and a missing turn is empty."""
    turns: list[Mapping[str, Any]] = []
    for message in messages:
        before = turns[-1] if turns else {"role": "system"}
        if message["role"] == before["role"] in ("user", "assistant") and not _calls(before) and not _calls(message):
            turns[-1] = _joined([before, message])
            continue
        if message["role"] == "assistant" and before["role"] == "system":
            turns.append({"role": "user", "content": ""})
        if message["role"] == "user" and before["role"] == "tool":
            turns.append({"role": "assistant", "content": ""})
        turns.append(message)
    return turns


def _joined(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One message with the fields and texts of several, as paragraphs."""
    if len(messages) == 1:
        return dict(messages[0])
    texts = ("\n".join(_texts(message["content"])) for message in messages)
    fields = {name: value for message in messages for name, value in message.items()}
    return {**fields, "content": "\n\n".join(text for text in texts if text)}


def _divided(messages: Sequence[Mapping[str, Any]], shape: Shape) -> list[Mapping[str, Any]]:
    """Text apart from calls, and calls from each other with its result behind each, where the shape is such."""
    divided: list[Mapping[str, Any]] = []
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls = _calls(message)
        if calls and message["content"] and shape.text_apart:
            divided.append({name: value for name, value in message.items() if name != "tool_calls"})
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        if len(calls) < 2 or not shape.one_call:
            divided.append(message)
            continue
        results = []
        while rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        for call in calls:
            divided.append({**message, "tool_calls": [call]})
            divided += [result for result in results if result.get("tool_call_id") == call.get("id")]
            message = {"role": "assistant", "content": ""}
        known = {call.get("id") for call in calls}
        divided += [result for result in results if result.get("tool_call_id") not in known]
    return divided


def _shaped(message: Mapping[str, Any], shape: Shape, names: Mapping[Any, str]) -> dict[str, Any]:
    fields = {name: value for name, value in message.items() if name not in ("role", "content")}
    if "tool_calls" in fields:
        fields["tool_calls"] = [_shaped_call(call, shape) for call in fields["tool_calls"]]
    if message["role"] == "tool":
        answered = fields.get("tool_call_id")
        if shape.result_names and answered in names:
            fields.setdefault("name", names[answered])
        if shape.short_ids and answered is not None:
            fields["tool_call_id"] = _short(answered)
    return shape.message(message["role"], message["content"], **fields)


def _shaped_call(call: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    function = call["function"]
    as_wanted = _as_text if shape.arguments_as_text else _as_object
    shaped = {**call, "function": {**function, "arguments": as_wanted(function["arguments"])}}
    return {**shaped, "id": _short(call["id"])} if shape.short_ids and call.get("id") is not None else shaped


def _as_text(arguments: str | Mapping[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """The object; a text that is none, which models write too, and which a cut answer leaves, stays as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _short(call_id: str) -> str:
    """Nine letters and digits, the same for the same id."""
    return call_id if re.fullmatch("[a-zA-Z0-9]{9}", call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _calls(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls", ())
    return calls


def _texts(content: str | Sequence[str]) -> Sequence[str]:
    return [content] if isinstance(content, str) else content
