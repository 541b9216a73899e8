"""The message format of a chat template, found by rendering small conversations with it.

A template is a program that may rename fields and branch at will, so its output says more than its source.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, get_args

from trtllm_jax.text.message_format import Content, EmptyContent, MessageFormat, text_part

Message = Mapping[str, Any]


@dataclass(frozen=True)
class TemplateTraits:
    """What is known of a template.

    Attributes:
        format: how it reads messages; `MessageFormat()` where it renders nothing.
        turn_end: what it writes after an assistant's text at the end of a conversation.
        next_turn: what it writes there if a generation prompt follows.
    """

    format: MessageFormat
    turn_end: str
    next_turn: str


@lru_cache(maxsize=64)
def inspect_template(template: str, special_tokens: tuple[tuple[str, str], ...]) -> TemplateTraits:
    """The traits of a Jinja template, whatever it does.

    ``special_tokens`` are the variables that a tokenizer gives its templates, such as ("bos_token", "<s>").
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(*messages: Message, tools: Any = (_TOOL,), **variables: Any) -> str:
        """The rendered conversation, "" where the template raises."""
        given = {"chat_template": template, "tools": tools and list(tools), **dict(special_tokens), **variables}
        try:
            (rendered,), _ = render_jinja_template(conversations=[[dict(each) for each in messages]], **given)
        except Exception:  # a template is a program, which may fail in any way
            return ""
        return str(rendered)

    probe = _Probe(render)
    contents = probe.find_contents()
    if not contents:  # the template may refuse tools
        probe = _Probe(partial(render, tools=None))
        contents = probe.find_contents()
    found = MessageFormat(contents)
    if contents:
        for add_fields in (probe.find_calls, probe.find_tool_results, probe.find_splits, probe.find_roles):
            found = add_fields(found)
    return TemplateTraits(found, probe.text_end(found), probe.text_end(found, add_generation_prompt=True))


# The texts contain line breaks, which are escaped wherever a template writes a text as JSON or as a Python repr.
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


def _all_in(rendered: str, *texts: str) -> bool:
    return all(text in rendered for text in texts)


class _Probe:
    """Finds the fields of the message format one after another; each method relies on the fields found before."""

    def __init__(self, render: Callable[..., str]) -> None:
        self._render = render

    def find_contents(self) -> dict[str, Content]:
        """The form of each role's content; {} where the content of a user's message is not read."""
        user = self._content(lambda content: [{"role": "user", "content": content}])
        if user is None:
            return {}
        ask = MessageFormat({"user": user}).message("user", "?")
        found = {
            "system": self._content(lambda content: [{"role": "system", "content": content}, ask]),
            "assistant": self._content(lambda content: [ask, {"role": "assistant", "content": content}]),
        }
        return {"user": user} | {role: content or _fallback_content(user) for role, content in found.items()}

    def find_calls(self, format: MessageFormat) -> MessageFormat:
        """The form of tool calls; the format is unchanged where the template writes none."""
        ask = format.message("user", "?")
        usual = self._render(ask).count("None")
        for short, as_json, empty in itertools.product((False, True), (False, True), get_args(EmptyContent)):
            found = replace(format, short_call_ids=short, arguments_as_json=as_json, empty_content=empty)
            rendered = [self._render(ask, _call_message(found, 1, call_id)) for call_id in _ids(found, 1)]
            if all(_has_call(each, found, 1) and each.count("None") == usual for each in rendered):
                return found
        return format

    def find_tool_results(self, format: MessageFormat) -> MessageFormat:
        """The form of the messages that have the results of tool calls."""
        before = [format.message("user", "?"), _call_message(format, 1)]

        def conversation(content: Any, **name: str) -> list[Message]:
            return [*before, {"role": "tool", "tool_call_id": _ids(format, 1)[0], "content": content, **name}]

        named = {"name": _NAME}
        found = self._content(conversation) or self._content(lambda content: conversation(content, **named))
        content = found or _fallback_content(format.content["user"])
        text = "lurbam"
        plain, with_name = (self._render(*conversation(content.encode(text), **name)) for name in ({}, named))
        return replace(
            format,
            content={**format.content, "tool": content},
            tool_result_role="tool" if text in plain + with_name else "user",
            tool_result_names=with_name.count(_NAME) > plain.count(_NAME),
        )

    def find_splits(self, format: MessageFormat) -> MessageFormat:
        """Whether text and calls, or several calls, must be in separate messages."""
        text, ask, answer = _TEXTS[0], format.message("user", "?"), format.message("assistant", "!")
        one, two = _call_message(format, 1), _call_message(format, 2)
        first, second = _result_message(format, 1), _result_message(format, 2)
        both = {**one, "tool_calls": [*one["tool_calls"], *two["tool_calls"]]}
        with_text = format.message("assistant", text, tool_calls=one["tool_calls"])

        def reads(text: str, calls: int, *messages: Message) -> bool:
            rendered = self._render(ask, *messages)
            return text in rendered and all(_has_call(rendered, format, number + 1) for number in range(calls))

        return replace(
            format,
            split_text_and_calls=not reads(text, 1, with_text)
            and reads(text, 1, format.message("assistant", text), one, first, answer, ask),
            single_call=not reads("", 2, both) and reads("", 2, one, first, two, second, answer, ask),
        )

    def find_roles(self, format: MessageFormat) -> MessageFormat:
        """Which roles may follow each other, and where system messages may be."""
        one, two, three = _TEXTS
        user, answer = format.message("user", one), format.message("assistant", "yes")
        first, again = format.message("system", two), format.message("system", three)
        twice = self._render(user, format.message("user", two), answer, format.message("assistant", three), user)
        together, later = self._render(first, again, user), self._render(first, user, answer, again, user)
        system: Literal["many", "one", "none"] = "one" if _all_in(self._render(first, user), one, two) else "none"
        if _all_in(together, *_TEXTS) and _all_in(later, *_TEXTS):
            system = "many"
        return replace(format, system=system, alternating_roles=not _all_in(twice, *_TEXTS))

    def text_end(self, format: MessageFormat, **variables: Any) -> str:
        """What the template writes after an assistant's text, with further variables set."""
        text = _TEXTS[0]
        rendered = self._render(format.message("user", "?"), format.message("assistant", text), **variables)
        return rendered.rpartition(text)[2] if text in rendered else ""

    def _content(self, conversation: Callable[[Any], list[Message]]) -> Content | None:
        """The form in which the content of one message is read; None where it is not written unchanged."""
        one, two, _ = _TEXTS

        def reads(content: Any) -> bool:
            return _all_in(self._render(*conversation(content)), one, two)

        text, parts = reads(f"{one}\n{two}"), reads([text_part(one), text_part(two)])
        if text or parts:
            return Content.EITHER if text and parts else Content.TEXT if text else Content.PARTS
        return Content.ONE_PART if reads([text_part(f"{one}\n{two}")]) else None


def _fallback_content(user: Content) -> Content:
    """The form for a role whose content is not written, or is written as JSON: a text if the template reads texts."""
    return Content.TEXT if user is Content.EITHER else user


def _ids(format: MessageFormat, number: int) -> Sequence[str]:
    """Ids of a tool call, in the lengths that clients use."""
    return [f"abcdefgh{number}"] if format.short_call_ids else [f"call_0123456789abcdef{number}", f"c{number}"]


def _call_message(format: MessageFormat, number: int, call_id: str | None = None) -> dict[str, Any]:
    """An assistant's message that has a tool call and no text."""
    arguments: Any = {f"weq{number}": f"jux{number}"}
    if format.arguments_as_json:
        arguments = json.dumps(arguments)
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": call_id or _ids(format, number)[0], "type": "function", "function": function}
    return format.message("assistant", "", tool_calls=[call])


def _result_message(format: MessageFormat, number: int) -> dict[str, Any]:
    name = {"name": _NAME} if format.tool_result_names else {}
    return format.message("tool", "!", tool_call_id=_ids(format, number)[0], **name)


def _has_call(rendered: str, format: MessageFormat, number: int) -> bool:
    """Whether a tool call was written with its arguments, as JSON or in a form of the template's own."""
    key, value = f"weq{number}", f"jux{number}"
    if format.arguments_as_json:
        return json.dumps({key: value}) in rendered
    # An object whose Python repr is written should have been JSON text.
    return _all_in(rendered, key, value) and repr({key: value}) not in rendered
