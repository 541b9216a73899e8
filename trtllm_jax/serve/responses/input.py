"""A request of /v1/responses as the request of /v1/chat/completions with the same meaning."""

from collections.abc import Iterable, Sequence
from typing import Any

from trtllm_jax.serve.http.errors import ApiError
from trtllm_jax.serve.protocol.chat import ChatRequest, ContentPart
from trtllm_jax.serve.protocol.responses import (
    CallItem,
    CallOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)

LOGPROBS = "message.output_text.logprobs"
"""The member of `include` that asks for log-probabilities."""

_SAME_NAME = (
    "cache_salt", "chat_template_kwargs", "ignore_eos", "min_p", "parallel_tool_calls", "repetition_penalty", "seed",
    "stop", "stream", "temperature", "top_k", "top_p", "truncate_prompt_tokens",
)  # fmt: skip

_RESPONSES_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "logprobs": "include",
    "function.parameters": "parameters",
}
"""Fields of a chat, longest names first, and their names in /v1/responses."""


def input_items(body: ResponsesRequest) -> list[InputItem]:
    """The input as items."""
    return [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input


def to_chat_request(body: ResponsesRequest, items: Sequence[InputItem]) -> ChatRequest:
    """The chat request whose conversation ends with `items`."""
    given: dict[str, Any] = {name: getattr(body, name) for name in _SAME_NAME}
    messages = [{"role": "system", "content": body.instructions}] if body.instructions is not None else []
    given |= {
        "model": body.model,
        "messages": [*messages, *_messages(items)],
        "max_completion_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning and body.reasoning.effort,
        "response_format": _format(body),
        "tools": [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools or ()],
        "tool_choice": _choice(body),
    }
    if LOGPROBS in (body.include or ()):
        given |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return ChatRequest.model_validate({name: value for name, value in given.items() if value not in (None, [])})


def in_responses_terms(error: ApiError) -> ApiError:
    """A chat's error with the field names of /v1/responses."""
    param, message = error.param, error.message
    if param is not None and (param == "prompt" or param.startswith("messages")):
        return ApiError(error.status, message, param="input", code=error.code, headers=error.headers)
    for name, here in _RESPONSES_NAMES.items():
        if param is not None and name in param:
            param, message = param.replace(name, here), message.replace(name, here)
            break
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


def _choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    return {"type": "function", "function": {"name": choice.name}}


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return {"type": "json_schema", "json_schema": {"name": wanted.name, "schema": wanted.schema_}}


def _messages(items: Iterable[InputItem]) -> list[dict[str, Any]]:
    """The messages of items; consecutive items of the assistant are one message, as templates expect."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                _assistant(messages, "content")["content"] = _text(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": _content(item.content)})
            case ReasoningItem():
                thought = _text(item.content or item.summary or [])
                _assistant(messages, "reasoning_content")["reasoning_content"] = thought
            case CallItem():
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                _assistant(messages).setdefault("tool_calls", []).append(call)
            case CallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
    return messages


def _assistant(messages: list[dict[str, Any]], *without: str) -> dict[str, Any]:
    """The assistant's last message, or a new one where that has one of the fields `without` already."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in without):
        messages.append({"role": "assistant"})
    return messages[-1]


def _content(content: str | Sequence[ContentPart]) -> Any:
    """The content of a chat's message; the template refuses parts that are no text."""
    if isinstance(content, str):
        return content
    return [{"type": "text" if part.text is not None else part.type, "text": part.text} for part in content]


def _text(content: str | Sequence[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text or part.refusal or "" for part in content)
