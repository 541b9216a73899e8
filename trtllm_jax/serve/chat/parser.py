"""A model's text as a message: reasoning, content and tool calls."""

import uuid
from collections.abc import Sequence
from typing import Any

from trtllm_jax.serve.http.errors import bad_request
from trtllm_jax.serve.parsers.base import ReasoningParser, ToolParser
from trtllm_jax.serve.parsers.constraints import plan_tools
from trtllm_jax.serve.parsers.events import CallArguments, CallBroken, CallStart, ContentText, ToolEvent
from trtllm_jax.serve.parsers.grammar import answer_grammar, call_grammar
from trtllm_jax.serve.protocol.base import ResponseFormat
from trtllm_jax.serve.protocol.chat import ChatRequest
from trtllm_jax.serve.sampling import guided_decoding_arguments
from trtllm_jax.serve.server import Server

Delta = dict[str, Any]

_MISTRAL_ID_LENGTH = 9
"""Characters of a call's id, which Mistral's templates require."""


class ChatParser:
    """Parses the answers to one request. ApiError or ValueError where the server cannot do what the request asks for.

    Attributes:
        tools: the tools that the template shows.
        keep_special_tokens: whether the parsers need special tokens in the text.
    """

    def __init__(self, server: Server, body: ChatRequest) -> None:
        choice = body.tool_choice
        plan = plan_tools(
            [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            choice if choice is None or isinstance(choice, str) else choice.model_dump(),
        )
        self.tools = plan.shown
        self._forced_tools = plan.forced
        # A named function is called once.
        self._parallel = body.parallel_tool_calls is not False and (choice is None or isinstance(choice, str))
        self._tokenizer = server.llm.tokenizer
        self._reasoning_parser = server.reasoning_parser
        self._tool_parser = server.tool_parser if plan.shown else None
        if plan.forced and self._tool_parser is None:
            raise bad_request(
                "tool_choice", "tool_choice needs a server that reads this model's calls: set its tool_parser"
            )
        parsers = (self._reasoning_parser, self._tool_parser)
        self.keep_special_tokens = any(parser.keep_special_tokens for parser in parsers if parser is not None)

    def grammar(self, prompt: str, response_format: ResponseFormat | None) -> str | None:
        """The grammar of answers to `prompt` that must call a tool, or reason before they follow `response_format`.

        None where any text is an answer, or where `response_format` alone constrains it.
        """
        must_call, may_reason = bool(self._forced_tools), self._reasoning_parser is not None
        if self._tokenizer is None or not (must_call or (may_reason and response_format)):
            return None
        special = {text: number for number, text in self._tokenizer.special_tokens.items()}
        reasoning = None if self._reasoning_parser is None else self._reasoning_parser.name
        if self._forced_tools and self._tool_parser is not None:
            return call_grammar(
                self._tool_parser.name,
                self._forced_tools,
                special_tokens=special,
                parallel=self._parallel,
                reasoning=reasoning,
                prompt=prompt,
            )
        arguments = None if reasoning is None else guided_decoding_arguments(response_format)
        if reasoning is None or arguments is None or "grammar" in arguments:
            return None
        schema = {"type": "object"} if "json_object" in arguments else arguments.get("json")
        if not isinstance(schema, dict | None):
            return None
        regex = arguments.get("regex")
        return answer_grammar(reasoning, schema=schema, regex=regex, special_tokens=special, prompt=prompt)

    def message_parser(self, prompt: str | None) -> "MessageParser":
        """A parser of one more answer to `prompt`."""
        reasoning = None if self._reasoning_parser is None else self._reasoning_parser(prompt or "")
        if self._tool_parser is None:
            return MessageParser(reasoning, None)
        return MessageParser(reasoning, self._tool_parser(self.tools), mistral=self._tool_parser.name == "mistral")


class MessageParser:
    """Parses one answer's text into deltas of a message.

    Attributes:
        is_content_only: whether all text is content, because there are no parsers.
    """

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, mistral: bool = False) -> None:
        self.is_content_only = reasoning is None and tools is None
        self._reasoning = reasoning
        self._tools = tools
        self._mistral = mistral
        self._called: set[int] = set()

    def feed(self, text: str) -> list[Delta]:
        """The deltas that more text makes certain."""
        if self._reasoning is None:
            return self._content_deltas(text)
        reasoning, content = self._reasoning.feed(text)
        return [*_reasoning_deltas(reasoning), *self._content_deltas(content)]

    def finish(self) -> list[Delta]:
        """The deltas of the text that the parsers held back."""
        reasoning, content = self._reasoning.finish() if self._reasoning else ("", "")
        deltas = [*_reasoning_deltas(reasoning), *self._content_deltas(content)]
        return deltas + [self._delta(event) for event in self._tools.finish()] if self._tools else deltas

    def finish_reason(self, reason: str | None) -> str | None:
        """`reason`, or "tool_calls" where a finished answer calls tools."""
        return "tool_calls" if reason == "stop" and self._called else reason

    def message(self, text: str) -> dict[str, Any]:
        """The message of a complete answer."""
        return _merge_deltas([*self.feed(text), *self.finish()])

    def _content_deltas(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._tools is None:
            return [{"content": text}]
        return [self._delta(event) for event in self._tools.feed(text)]

    def _delta(self, event: ToolEvent) -> Delta:
        match event:
            case ContentText(text):
                return {"content": text}
            case CallStart(index, name):
                self._called.add(index)
                call = {"index": index, "id": self._new_id(), "type": "function"}
                return {"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]}
            case CallArguments(index, fragment):
                return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}
            case CallBroken(index, source):
                # A stream cannot take back the call's beginning; its text at least is not lost.
                self._called.discard(index)
                return {"content": source, "broken": index}

    def _new_id(self) -> str:
        number = uuid.uuid4().hex
        return number[:_MISTRAL_ID_LENGTH] if self._mistral else f"call_{number[:24]}"


def _reasoning_deltas(text: str) -> list[Delta]:
    return [{"reasoning_content": text}] if text else []


def _merge_deltas(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The message that deltas add up to; broken calls are content only."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls[part["index"]] = {**part, "function": dict(part["function"])}
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        calls.pop(delta.get("broken", -1), None)
    content = "".join(delta.get("content", "") for delta in deltas)
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        named = ("id", "type", "function")
        message["tool_calls"] = [{name: call[name] for name in named} for call in calls.values()]
    return message
