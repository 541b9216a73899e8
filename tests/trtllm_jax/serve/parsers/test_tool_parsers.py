"""Calls written in a format are read back, however the text is cut; other text is content, unchanged."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from trtllm_jax.serve.parsers.base import ToolParser
from trtllm_jax.serve.parsers.events import (
    CallArguments,
    CallBroken,
    CallStart,
    ContentText,
    Parsed,
    ToolEvent,
    collect,
)
from trtllm_jax.serve.parsers.registry import TOOL_PARSERS, make_tool_parser

STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda text: "</par" not in text)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
KEYS = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=3)), min_size=1, max_size=3)
CONTENT = st.from_regex(r"([A-Za-z.,é☺][A-Za-z .,\n]{0,20}[A-Za-z.])?", fullmatch=True)
MARKERS = [
    '{"name": "f", "arguments": {', '{"name": "f", "parameters": {"a": 1}}', "<tool_call>", "</tool_call>", "\n", " ",
    "[TOOL_CALLS]", "[", "]", "[ARGS]", "f", "{}", '"', "}", "{", "<function=f>", "<parameter=a>", "</parameter>", ";",
    "</function>", "<|python_tag|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```",
    "function<｜tool▁sep｜>f\n```json\n", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|channel|>", "<|message|>",
    "commentary to=functions.f", "<|call|>", "<|start|>assistant", "1", "tru", "\\u12", "<", "<tool", "<|", "[TOOL",
]  # fmt: skip
GARBAGE = st.lists(st.sampled_from(MARKERS) | st.text(max_size=4), max_size=14).map("".join)
quick = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parser_of(form: str, calls: list[tuple[str, dict[str, Any]]] | None = None) -> ToolParser:
    factory = make_tool_parser(form.removesuffix(" args"))
    assert factory is not None
    return factory([tool(*call) for call in {name: (name, values) for name, values in calls or []}.values()])


def tool(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    types = {key: {"type": "string"} for key, value in arguments.items() if isinstance(value, str)}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": types}}}


def fed(parser: ToolParser, pieces: list[str]) -> list[ToolEvent]:
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def merged(events: list[ToolEvent]) -> list[ToolEvent]:
    """Neighbouring texts and neighbouring fragments as one."""
    result: list[ToolEvent] = []
    for event in events:
        match result[-1:], event:
            case [ContentText(before)], ContentText(text):
                result[-1] = ContentText(before + text)
            case [CallArguments(index, before)], CallArguments(_, fragment):
                result[-1] = CallArguments(index, before + fragment)
            case _:
                result.append(event)
    return result


def cut(draw: st.DataObject, text: str) -> list[str]:
    at = sorted({0, len(text), *draw.draw(st.lists(st.integers(0, len(text)), max_size=12))})
    return [text[start:end] for start, end in itertools.pairwise(at)]


@quick
@given(content=CONTENT, calls=CALLS, data=st.data())
def test_written_calls_are_read_back_however_cut(form: str, written: Any, content: str, calls: Any, data: Any) -> None:
    if form == "llama3":
        content = ""
    if form == "qwen3_coder":
        calls = calls[:1]  # the schemas that tell strings from numbers are made from the calls, one a name
    text = written(form, content, calls)
    events = fed(parser_of(form, calls), cut(data, text))
    parsed = collect(events)
    assert parsed.content == content
    assert [(call.name, json.loads(call.arguments)) for call in parsed.calls] == calls
    assert merged(events) == merged(fed(parser_of(form, calls), list(text)))


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
@quick
@given(text=GARBAGE, data=st.data())
def test_any_text_gives_the_same_however_cut_and_complete_calls_hold_json(name: str, text: str, data: Any) -> None:
    whole = merged(fed(parser_of(name), [text]))
    assert merged(fed(parser_of(name), cut(data, text))) == whole
    assert merged(fed(parser_of(name), list(text))) == whole
    parsed = collect(whole)
    for call in parsed.calls:
        assert isinstance(json.loads(call.arguments), dict)
    if not parsed.calls:
        ends = TOOL_PARSERS[name].ends
        assert without(parsed.content, ends) == without(text, ends)


def without(text: str, tokens: tuple[str, ...]) -> str:
    for token in tokens:
        text = text.replace(token, "")
    return text


@quick
@given(calls=CALLS, data=st.data())
def test_a_prefix_of_an_answer_shows_no_marker_and_no_broken_fragment(
    form: str, written: Any, calls: Any, data: Any
) -> None:
    text = written(form, "", calls)
    parser = parser_of(form)
    before = parser.feed(text[: data.draw(st.integers(0, len(text)))])
    assert [event for event in before if isinstance(event, ContentText | CallBroken)] == []


@quick
@given(arguments=st.dictionaries(KEYS, STRINGS, min_size=1, max_size=2))
def test_arguments_stream_as_they_grow(form: str, written: Any, arguments: dict[str, str]) -> None:
    arguments = {key: value + "and so on" for key, value in arguments.items()}
    events = fed(parser_of(form, [("f", arguments)]), list(written(form, "", [("f", arguments)])))
    assert events[0] == CallStart(0, "f")
    assert sum(isinstance(event, CallArguments) for event in events) > 8 * len(arguments)


TEMPLATE = {
    "start_anchor": "<|im_start|>assistant",
    "fields": {
        "content": {},
        "tool_calls": {
            "open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
        },
    },
}  # fmt: skip


@quick
@given(calls=CALLS)
def test_transformers_reads_the_same_calls(written: Any, calls: Any) -> None:
    text = written("hermes", "Let me look.", calls)
    theirs = parse_response(text, TEMPLATE, prefix="")
    ours = collect(fed(parser_of("hermes"), [text]))
    assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in ours.calls] == theirs["tool_calls"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call> and more'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1'),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f g", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a":' + "[" * 5000),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>"),
        ("llama3", '{"name": "Bob", "age": 3}'),
        ("llama3", '  {"a": [1, 2'),
        ("mistral", "[TOOL_CALLS]f{}"),
        ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\nwhat?"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
        ("gpt-oss", "<|channel|>commentary to=functions.f<|message|>[1]"),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert collect(fed(parser_of(name), [text])) == Parsed(text, ())


def test_a_call_of_no_known_tool_is_content() -> None:
    text = '{"name": "g", "parameters": {}}'
    assert collect(fed(parser_of("llama3", [("f", {})]), [text])).content == text
    assert collect(fed(parser_of("llama3", [("g", {})]), [text])).calls


def test_a_broken_call_says_what_it_was_and_the_next_has_the_next_index() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": x<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    events = merged(fed(parser_of("hermes"), [text]))
    assert events == [
        CallStart(0, "f"),
        CallArguments(0, '{"a": x'),
        CallBroken(0, '<tool_call>{"name": "f", "arguments": {"a": x'),
        CallStart(1, "g"),
        CallArguments(1, "{}"),
    ]


def test_python_literals_of_templates_are_json_values() -> None:
    text = "<tool_call><function=f><parameter=a>True</parameter><parameter=b>None</parameter></function></tool_call>"
    assert json.loads(collect(fed(parser_of("qwen3_coder"), [text])).calls[0].arguments) == {"a": True, "b": None}


@pytest.mark.parametrize(
    ("model_type", "template", "name"),
    [
        ("llama", None, "llama3"),
        ("llama", "{{ '<tool_call>' }}", "hermes"),
        ("qwen3_moe", "<tool_call><function=x>", "qwen3_coder"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜> ```json", "deepseek_v3"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("mistral", None, "mistral"),
        ("gpt_oss", None, "gpt-oss"),
    ],
)
def test_auto_follows_the_template_then_the_type(model_type: str, template: str | None, name: str) -> None:
    factory = make_tool_parser("auto", model_type=model_type, chat_template=template)
    assert factory is not None
    assert factory.name == name


def test_unknown_names_are_refused_and_unknown_models_have_no_parser() -> None:
    assert make_tool_parser("auto", model_type="gpt2") is None
    with pytest.raises(ValueError, match=r"tool_parser = 'x' is unknown: use one of auto, deepseek_v3"):
        make_tool_parser("x")
