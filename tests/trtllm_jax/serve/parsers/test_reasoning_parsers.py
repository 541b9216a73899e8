"""Reasoning and content are told apart, however the text is cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_jax.serve.parsers.events import collect
from trtllm_jax.serve.parsers.registry import REASONING_PARSERS, make_reasoning_parser, make_tool_parser

HARMONY_CALL = '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>'
PIECES = [
    "<think>", "</think>", "\n", "<thi", "</", " to=", "functions.f", "<|channel|>", "analysis", "final", "commentary",
    "<|message|>", "<|end|>", "<|start|>assistant", "<|call|>", "<|return|>", "<|constrain|>json", "Hi", " ",
]  # fmt: skip
quick = settings(deadline=None, max_examples=60)


def parse(name: str, pieces: list[str], prompt: str = "") -> tuple[str, str]:
    factory = make_reasoning_parser(name)
    assert factory is not None
    parser = factory(prompt)
    deltas = [*map(parser.feed, pieces), parser.finish()]
    return "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("qwen3", "", "<think>\nhm\n\nso\n</think>\n\nHi\n", ("hm\n\nso", "Hi\n")),
        ("qwen3", "", "\nHi <think>x</think>", ("", "\nHi <think>x</think>")),
        ("qwen3", "", "<think>\n\n</think>\n\nHi", ("", "Hi")),
        ("qwen3", "...<think>\n", "hm</think>Hi", ("hm", "Hi")),
        ("qwen3", "", "<think>hm", ("hm", "")),
        ("deepseek-r1", "", "hm\n</think>\n\nHi", ("hm", "Hi")),
        ("deepseek-r1", "", "<think>hm</think>Hi", ("hm", "Hi")),
        ("deepseek-r1", "...</think>", "Hi", ("", "Hi")),
        (
            "gpt-oss",
            "",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
            ("hm", "Hi"),
        ),
        ("gpt-oss", "", ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', None),
        ("gpt-oss", "", "Hi, plain", ("", "Hi, plain")),
        ("gpt-oss", "", "<|channel|>analysis to=browser.open<|message|>{}<|call|>", ("{}", "")),
        ("gpt-oss", "", "<|channel|>no\nheader", ("", "<|channel|>no\nheader")),
    ],
)
def test_examples(name: str, prompt: str, text: str, expected: tuple[str, str] | None) -> None:
    assert parse(name, [text], prompt) == (expected or ("", HARMONY_CALL))
    assert parse(name, list(text), prompt) == (expected or ("", HARMONY_CALL))


@pytest.mark.parametrize("name", REASONING_PARSERS)
@quick
@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join), data=st.data())
def test_any_text_gives_the_same_however_cut(name: str, text: str, data: Any) -> None:
    at = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=8))})
    pieces = [text[start:end] for start, end in itertools.pairwise(at)]
    assert parse(name, pieces) == parse(name, [text]) == parse(name, list(text))


def test_text_appears_as_it_comes() -> None:
    factory = make_reasoning_parser("qwen3")
    assert factory is not None
    parser = factory()
    assert parser.feed("<th") == ("", "")
    assert parser.feed("ink>I se") == ("I se", "")
    assert parser.feed("e</thin") == ("e", "")
    assert parser.feed("k>He") == ("", "He")


def test_calls_of_gpt_oss_pass_both_parsers() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>Looking.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    )
    reasoning, content = parse("gpt-oss", list(text))
    factory = make_tool_parser("gpt-oss")
    assert factory is not None
    parser = factory()
    parsed = collect(parser.feed(content) + parser.finish())
    assert (reasoning, parsed.content, list(parsed.calls)) == ("hm", "Looking.", [("f", '{"a": 1}')])


@pytest.mark.parametrize(
    ("model_type", "template", "name"),
    [
        ("gpt_oss", None, "gpt-oss"),
        ("qwen3", "{{ '<think>' }}", "qwen3"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜> <think>", "deepseek-r1"),
    ],
)
def test_auto(model_type: str, template: str | None, name: str) -> None:
    factory = make_reasoning_parser("auto", model_type=model_type, chat_template=template)
    assert factory is not None
    assert factory.name == name


def test_no_reasoning_and_unknown_names() -> None:
    assert make_reasoning_parser("auto", model_type="llama", chat_template="{{ messages }}") is None
    with pytest.raises(ValueError, match="reasoning_parser = 'x' is unknown: use one of auto, deepseek-r1"):
        make_reasoning_parser("x")
