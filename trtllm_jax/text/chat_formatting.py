"""Arranges messages in the form that a chat template reads."""

import hashlib
import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_jax.text.chat_messages import texts_of
from trtllm_jax.text.message_format import MessageFormat


def format_messages(messages: Sequence[Mapping[str, Any]], format: MessageFormat) -> list[dict[str, Any]]:
    """The messages of `read_messages` in the form that a template reads."""
    if format.tool_result_role == "user":
        messages = [_as_user_message(message) if message["role"] == "tool" else message for message in messages]
    arranged = _place_system_messages(messages, format)
    if format.alternating_roles:
        arranged = _alternating(arranged)
    names = {call.get("id"): call["function"]["name"] for message in arranged for call in _calls(message)}
    return [_encode_message(message, format, names) for message in _split(arranged, format)]


def _as_user_message(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": result["content"]}


def _place_system_messages(messages: Sequence[Mapping[str, Any]], format: MessageFormat) -> list[Mapping[str, Any]]:
    """System messages where the template allows them; the others become the start of the user's next message."""
    if format.system == "many":
        return list(messages)
    arranged: list[Mapping[str, Any]] = []
    pending: list[Mapping[str, Any]] = []
    for message in messages:
        if (
            message["role"] == "system"
            and format.system == "one"
            and all(each["role"] == "system" for each in arranged)
        ):
            arranged = [_join([*arranged, message])]
        elif message["role"] == "system":
            pending.append(message)
        elif message["role"] == "user" and pending:
            arranged.append({**message, "content": _join([*pending, message])["content"]})
            pending = []
        else:
            arranged.append(message)
    return [*arranged, {**_join(pending), "role": "user"}] if pending else arranged


def _alternating(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Alternating turns that start with the user's: messages of the same role are joined, missing turns are empty."""
    turns: list[Mapping[str, Any]] = []
    for message in messages:
        before = turns[-1] if turns else {"role": "system"}
        if message["role"] == before["role"] in ("user", "assistant") and not _calls(before) and not _calls(message):
            turns[-1] = _join([before, message])
            continue
        if message["role"] == "assistant" and before["role"] == "system":
            turns.append({"role": "user", "content": ""})
        if message["role"] == "user" and before["role"] == "tool":
            turns.append({"role": "assistant", "content": ""})
        turns.append(message)
    return turns


def _join(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One message with the fields of several, and their texts as its paragraphs."""
    if len(messages) == 1:
        return dict(messages[0])
    texts = ("\n".join(texts_of(message["content"])) for message in messages)
    fields = {name: value for message in messages for name, value in message.items()}
    return {**fields, "content": "\n\n".join(text for text in texts if text)}


def _split(messages: Sequence[Mapping[str, Any]], format: MessageFormat) -> list[Mapping[str, Any]]:
    """Separate messages for text and calls, or for each call and its result, where the format demands them."""
    split: list[Mapping[str, Any]] = []
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls = _calls(message)
        if calls and message["content"] and format.split_text_and_calls:
            split.append({name: value for name, value in message.items() if name != "tool_calls"})
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        if len(calls) < 2 or not format.single_call:
            split.append(message)
            continue
        results = []
        while rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        for call in calls:
            split.append({**message, "tool_calls": [call]})
            split += [result for result in results if result.get("tool_call_id") == call.get("id")]
            message = {"role": "assistant", "content": ""}
        known = {call.get("id") for call in calls}
        split += [result for result in results if result.get("tool_call_id") not in known]
    return split


def _encode_message(message: Mapping[str, Any], format: MessageFormat, names: Mapping[Any, str]) -> dict[str, Any]:
    fields = {name: value for name, value in message.items() if name not in ("role", "content")}
    if "tool_calls" in fields:
        fields["tool_calls"] = [_encode_call(call, format) for call in fields["tool_calls"]]
    if message["role"] == "tool":
        answered = fields.get("tool_call_id")
        if format.tool_result_names and answered in names:
            fields.setdefault("name", names[answered])
        if format.short_call_ids and answered is not None:
            fields["tool_call_id"] = _short_call_id(answered)
    return format.message(message["role"], message["content"], **fields)


def _encode_call(call: Mapping[str, Any], format: MessageFormat) -> dict[str, Any]:
    function = call["function"]
    convert = _as_json if format.arguments_as_json else _as_object
    encoded = {**call, "function": {**function, "arguments": convert(function["arguments"])}}
    return (
        {**encoded, "id": _short_call_id(call["id"])}
        if format.short_call_ids and call.get("id") is not None
        else encoded
    )


def _as_json(arguments: str | Mapping[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """The object that JSON text describes; other texts are unchanged, since truncated answers contain such."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _short_call_id(call_id: str) -> str:
    """Nine letters and digits, which are the same for equal ids."""
    return call_id if re.fullmatch("[a-zA-Z0-9]{9}", call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _calls(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls", ())
    return calls
