"""What a chat template reads of a conversation, found by having it write small ones.

A template is a program that renames and branches at will, so what it writes says more than its source.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache, partial
from typing import Any, Literal, get_args

Message = Mapping[str, Any]


NoContent = Literal["empty", "null", "absent"]


class Content(Enum):
    """What a template takes for a message's content."""

    TEXT = "a text"
    PARTS = "a list of text parts"
    ONE_PART = "a list of one text part"
    EITHER = "a text or a list of text parts"

    def of(self, given: str | Sequence[str]) -> str | list[dict[str, str]]:
        """The content that is ``given`` as a text, or as several; texts that become one are lines of it."""
        joined = given if isinstance(given, str) else "\n".join(given)
        if self is Content.TEXT or (self is Content.EITHER and (isinstance(given, str) or not given)):
            return joined
        if self is Content.ONE_PART or isinstance(given, str) or not given:
            return [_part(joined)]
        return [_part(text) for text in given]


@dataclass(frozen=True)
class Shape:
    """How a template takes what OpenAI's API has in one way only, or leaves open.

    Attributes:
        content: by role; a role that is not named is written as a user's.
        no_content: what a message of calls has for content: an "empty" text, "null", or nothing ("absent").
        arguments_as_text: whether a call's arguments are JSON text, not an object.
        short_ids: whether the ids of calls must be nine letters and digits, as Mistral's are.
        results: whether the results of calls are messages of the role "tool", or a "user" has to tell them.
        result_names: whether a call's result names the function.
        text_apart: whether text and calls of one message are only written as two messages.
        one_call: whether a message is written with one call only.
        system: whether "many" messages of the role system are written, "one" at the start, or "none".
        alternating: whether two messages of one role cannot follow each other.
    """

    content: Mapping[str, Content] = field(default_factory=dict)
    no_content: NoContent = "empty"
    arguments_as_text: bool = False
    short_ids: bool = False
    results: Literal["tool", "user"] = "tool"
    result_names: bool = False
    text_apart: bool = False
    one_call: bool = False
    system: Literal["many", "one", "none"] = "many"
    alternating: bool = False

    def message(self, role: str, content: str | Sequence[str], **more: Any) -> dict[str, Any]:
        """A message with its content as the template takes it."""
        if not content and more.get("tool_calls") and self.no_content != "empty":
            return {"role": role, **({"content": None} if self.no_content == "null" else {}), **more}
        form = self.content.get(role) or self.content.get("user", Content.TEXT)
        return {"role": role, "content": form.of(content), **more}


@dataclass(frozen=True)
class TemplateFacts:
    """What is known of a template.

    Attributes:
        shape: what it was written for; `Shape()` where it writes nothing.
        turn_end: what it writes after an assistant's text at the end of a conversation.
        next_turn: what it writes there where a prompt for another answer follows.
    """

    shape: Shape
    turn_end: str
    next_turn: str


@lru_cache(maxsize=64)
def facts_of(template: str, special_tokens: tuple[tuple[str, str], ...]) -> TemplateFacts:
    """What is known of a Jinja text, whatever that is.

    ``special_tokens`` are the variables that a tokenizer gives its templates, such as ("bos_token", "<s>").
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    def write(*messages: Message, tools: Any = (_TOOL,), **more: Any) -> str:
        """What the template writes, "" where it refuses."""
        given = {"chat_template": template, "tools": tools and list(tools), **dict(special_tokens), **more}
        try:
            (written,), _ = render_jinja_template(conversations=[[dict(each) for each in messages]], **given)
        except Exception:  # a template is a program, which may fail in any way
            return ""
        return str(written)

    probe = _Probe(write)
    if not (contents := probe.contents()):  # it may refuse tools
        probe = _Probe(partial(write, tools=None))
        contents = probe.contents()
    shape = Shape(contents)
    if contents:
        for question in (probe.calls, probe.results, probe.several, probe.roles):
            shape = question(shape)
    return TemplateFacts(shape, probe.after_text(shape), probe.after_text(shape, add_generation_prompt=True))


# Line ends inside: they are escaped where something is written as JSON or as Python writes it.
_TEXTS = ("kiq\nzuv", "vop\nhex", "lur\nbam")
_NAME = "find_out"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "finds out",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "any"}}, "required": []},
    },
}


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _all_in(written: str, *texts: str) -> bool:
    return all(text in written for text in texts)


class _Probe:
    """Questions to a template, each of which goes on with what was found before."""

    def __init__(self, write: Callable[..., str]) -> None:
        self._write = write

    def contents(self) -> dict[str, Content]:
        """How each role's content is read; nothing where a user's is not."""
        user = self._content(lambda content: [{"role": "user", "content": content}])
        if user is None:
            return {}
        ask = Shape({"user": user}).message("user", "?")
        found = {
            "system": self._content(lambda content: [{"role": "system", "content": content}, ask]),
            "assistant": self._content(lambda content: [ask, {"role": "assistant", "content": content}]),
        }
        return {"user": user} | {role: content or _in_doubt(user) for role, content in found.items()}

    def calls(self, shape: Shape) -> Shape:
        """How calls are read; the shape as it is where none are written."""
        ask = shape.message("user", "?")
        usual = self._write(ask).count("None")
        for short, as_text, nothing in itertools.product((False, True), (False, True), get_args(NoContent)):
            found = replace(shape, short_ids=short, arguments_as_text=as_text, no_content=nothing)
            written = [self._write(ask, _calling(found, 1, call_id)) for call_id in _ids(found, 1)]
            if all(_has_call(each, found, 1) and each.count("None") == usual for each in written):
                return found
        return shape

    def results(self, shape: Shape) -> Shape:
        """How the result of a call is read."""
        before = [shape.message("user", "?"), _calling(shape, 1)]

        def conversation(content: Any, **name: str) -> list[Message]:
            return [*before, {"role": "tool", "tool_call_id": _ids(shape, 1)[0], "content": content, **name}]

        named = {"name": _NAME}
        found = self._content(conversation) or self._content(lambda content: conversation(content, **named))
        content = found or _in_doubt(shape.content["user"])
        text = "lurbam"
        plain, with_name = (self._write(*conversation(content.of(text), **name)) for name in ({}, named))
        return replace(
            shape,
            content={**shape.content, "tool": content},
            results="tool" if text in plain + with_name else "user",
            result_names=with_name.count(_NAME) > plain.count(_NAME),
        )

    def several(self, shape: Shape) -> Shape:
        """What must be divided: text from calls, and calls from each other."""
        text, ask, answer = _TEXTS[0], shape.message("user", "?"), shape.message("assistant", "!")
        one, two = _calling(shape, 1), _calling(shape, 2)
        first, second = _result(shape, 1), _result(shape, 2)
        both = {**one, "tool_calls": [*one["tool_calls"], *two["tool_calls"]]}
        with_text = shape.message("assistant", text, tool_calls=one["tool_calls"])

        def reads(text: str, calls: int, *messages: Message) -> bool:
            written = self._write(ask, *messages)
            return text in written and all(_has_call(written, shape, number + 1) for number in range(calls))

        return replace(
            shape,
            text_apart=not reads(text, 1, with_text)
            and reads(text, 1, shape.message("assistant", text), one, first, answer, ask),
            one_call=not reads("", 2, both) and reads("", 2, one, first, two, second, answer, ask),
        )

    def roles(self, shape: Shape) -> Shape:
        """Which messages may stand where."""
        one, two, three = _TEXTS
        user, answer = shape.message("user", one), shape.message("assistant", "yes")
        first, again = shape.message("system", two), shape.message("system", three)
        twice = self._write(user, shape.message("user", two), answer, shape.message("assistant", three), user)
        together, later = self._write(first, again, user), self._write(first, user, answer, again, user)
        system: Literal["many", "one", "none"] = "one" if _all_in(self._write(first, user), one, two) else "none"
        if _all_in(together, *_TEXTS) and _all_in(later, *_TEXTS):
            system = "many"
        return replace(shape, system=system, alternating=not _all_in(twice, *_TEXTS))

    def after_text(self, shape: Shape, **more: Any) -> str:
        """What follows an assistant's text, with further variables of the template."""
        text = _TEXTS[0]
        written = self._write(shape.message("user", "?"), shape.message("assistant", text), **more)
        return written.rpartition(text)[2] if text in written else ""

    def _content(self, conversation: Callable[[Any], list[Message]]) -> Content | None:
        """How the content of one of a conversation's messages is read; None where it is not written as it is."""
        one, two, _ = _TEXTS

        def reads(content: Any) -> bool:
            return _all_in(self._write(*conversation(content)), one, two)

        text, parts = reads(f"{one}\n{two}"), reads([_part(one), _part(two)])
        if text or parts:
            return Content.EITHER if text and parts else Content.TEXT if text else Content.PARTS
        return Content.ONE_PART if reads([_part(f"{one}\n{two}")]) else None


def _in_doubt(user: Content) -> Content:
    """The content of a role that is not written, or as JSON: a text, if any role's is."""
    return Content.TEXT if user is Content.EITHER else user


def _ids(shape: Shape, number: int) -> Sequence[str]:
    """Ids of a call, of the lengths that clients have."""
    return [f"abcdefgh{number}"] if shape.short_ids else [f"call_0123456789abcdef{number}", f"c{number}"]


def _calling(shape: Shape, number: int, call_id: str | None = None) -> dict[str, Any]:
    """The assistant's message with nothing but a call."""
    arguments: Any = {f"weq{number}": f"jux{number}"}
    if shape.arguments_as_text:
        arguments = json.dumps(arguments)
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": call_id or _ids(shape, number)[0], "type": "function", "function": function}
    return shape.message("assistant", "", tool_calls=[call])


def _result(shape: Shape, number: int) -> dict[str, Any]:
    name = {"name": _NAME} if shape.result_names else {}
    return shape.message("tool", "!", tool_call_id=_ids(shape, number)[0], **name)


def _has_call(written: str, shape: Shape, number: int) -> bool:
    """Whether a call is there with its arguments, as JSON writes them or in a form of the template's own."""
    key, value = f"weq{number}", f"jux{number}"
    if shape.arguments_as_text:
        return json.dumps({key: value}) in written
    # An object that is written as Python writes it was to be a text.
    return _all_in(written, key, value) and repr({key: value}) not in written
