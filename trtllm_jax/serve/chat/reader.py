"""What a model's text says: reasoning, content, calls of tools."""

import uuid
from collections.abc import Sequence
from typing import Any

from trtllm_jax.serve.http.errors import bad
from trtllm_jax.serve.parsers.base import (
    CallArguments,
    CallBroken,
    CallStart,
    ContentText,
    ReasoningParser,
    ToolEvent,
    ToolParser,
)
from trtllm_jax.serve.parsers.constraints import plan_tools
from trtllm_jax.serve.parsers.grammar import answer_grammar, call_grammar
from trtllm_jax.serve.protocol.base import ResponseFormat
from trtllm_jax.serve.protocol.chat import ChatRequest
from trtllm_jax.serve.sampling import rule_of
from trtllm_jax.serve.server import Server

Delta = dict[str, Any]

_MISTRAL_ID = 9
"""Characters of a call's id that Mistral's templates insist on."""


class Reading:
    """How one request's answers are read. ApiError or ValueError where the server cannot do what it asks for.

    Attributes:
        tools: what the template shows.
        keeps_special_tokens: whether the parsers need them in the text.
    """

    def __init__(self, server: Server, body: ChatRequest) -> None:
        choice = body.tool_choice
        named = choice if choice is None or isinstance(choice, str) else choice.model_dump()
        plan = plan_tools([tool.model_dump(exclude_none=True) for tool in body.tools or ()], named)
        self.tools = plan.shown
        self._forced = plan.forced
        # Who names a function wants one call of it.
        self._parallel = body.parallel_tool_calls is not False and (choice is None or isinstance(choice, str))
        self._server = server
        self._reasoning = server.reasoning
        self._calls = server.calls if plan.shown else None
        if plan.forced and self._calls is None:
            raise bad("tool_choice", "tool_choice needs a server that reads this model's calls: set its tool_parser")
        parsers = (self._reasoning, self._calls)
        self.keeps_special_tokens = any(parser.keep_special_tokens for parser in parsers if parser is not None)

    def grammar(self, prompt: str, wanted: ResponseFormat | None) -> str | None:
        """The grammar of answers to `prompt`: calls that must come, or thoughts and then what is wanted.

        None where any text is an answer, or `guidance` knows by itself.
        """
        tokenizer = self._server.llm.tokenizer
        if tokenizer is None or not (self._forced or (self._reasoning and wanted)):
            return None
        special = {text: number for number, text in tokenizer.special_tokens.items()}
        reasoning = None if self._reasoning is None else self._reasoning.name
        if self._forced and self._calls is not None:
            return call_grammar(
                self._calls.name,
                self._forced,
                special_tokens=special,
                parallel=self._parallel,
                reasoning=reasoning,
                prompt=prompt,
            )
        rule = None if reasoning is None else rule_of(wanted)
        if reasoning is None or rule is None or "grammar" in rule:
            return None
        schema = {"type": "object"} if "json_object" in rule else rule.get("json")
        if not isinstance(schema, dict | None):
            return None
        return answer_grammar(reasoning, schema=schema, regex=rule.get("regex"), special_tokens=special, prompt=prompt)

    def start(self, prompt: str | None) -> "Reader":
        """For one more answer to `prompt`."""
        reasoning = None if self._reasoning is None else self._reasoning(prompt or "")
        if self._calls is None:
            return Reader(reasoning, None)
        return Reader(reasoning, self._calls(self.tools), mistral=self._calls.name == "mistral")


class Reader:
    """One answer's text as deltas of a message.

    Attributes:
        plain: whether all text is content.
    """

    def __init__(self, reasoning: ReasoningParser | None, calls: ToolParser | None, *, mistral: bool = False) -> None:
        self.plain = reasoning is None and calls is None
        self._reasoning = reasoning
        self._calls = calls
        self._mistral = mistral
        self._open: set[int] = set()

    def feed(self, text: str) -> list[Delta]:
        """What more text says."""
        if self._reasoning is None:
            return self._content(text)
        thought, content = self._reasoning.feed(text)
        return [*_reasoning(thought), *self._content(content)]

    def finish(self) -> list[Delta]:
        """What was held back."""
        thought, content = self._reasoning.finish() if self._reasoning else ("", "")
        deltas = [*_reasoning(thought), *self._content(content)]
        return deltas + [self._delta(event) for event in self._calls.finish()] if self._calls else deltas

    def finish_reason(self, reason: str | None) -> str | None:
        """`reason`, or what OpenAI says in its place where the answer is a call."""
        return "tool_calls" if reason == "stop" and self._open else reason

    def message(self, text: str) -> dict[str, Any]:
        """A whole answer."""
        return _joined([*self.feed(text), *self.finish()])

    def _content(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._calls is None:
            return [{"content": text}]
        return [self._delta(event) for event in self._calls.feed(text)]

    def _delta(self, event: ToolEvent) -> Delta:
        match event:
            case ContentText(text):
                return {"content": text}
            case CallStart(index, name):
                self._open.add(index)
                call = {"index": index, "id": self._id(), "type": "function"}
                return {"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]}
            case CallArguments(index, fragment):
                return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}
            case CallBroken(index, source):
                # A stream cannot take back what it said of the call; the text at least is not lost.
                self._open.discard(index)
                return {"content": source, "broken": index}

    def _id(self) -> str:
        number = uuid.uuid4().hex
        return number[:_MISTRAL_ID] if self._mistral else f"call_{number[:24]}"


def _reasoning(text: str) -> list[Delta]:
    return [{"reasoning_content": text}] if text else []


def _joined(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The message that deltas add up to; calls that broke are content only."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls[part["index"]] = {**part, "function": dict(part["function"])}
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        calls.pop(delta.get("broken", -1), None)
    content = "".join(delta.get("content", "") for delta in deltas)
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        named = ("id", "type", "function")
        message["tool_calls"] = [{name: call[name] for name in named} for call in calls.values()]
    return message
