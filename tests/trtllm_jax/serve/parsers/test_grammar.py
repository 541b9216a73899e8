"""llguidance takes the calls that a grammar describes, and nothing else; the parsers read what it takes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from trtllm_jax.serve.parsers.constraints import check_tools, plan_tools
from trtllm_jax.serve.parsers.events import collect
from trtllm_jax.serve.parsers.grammar import answer_grammar, call_grammar
from trtllm_jax.serve.parsers.registry import TOOL_PARSERS, make_tool_parser

HARMONY = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "<|call|>")
SPECIAL = {"gpt-oss": HARMONY, "mistral": ("[TOOL_CALLS]",), "mistral args": ("[TOOL_CALLS]", "[ARGS]")}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool(
        "find",
        {
            "type": "object",
            "properties": {"where": {"type": "string"}, "count": {"type": "integer"}, "by": {"enum": ["size", "age"]}},
            "required": ["where"],
            "additionalProperties": False,
        },
    ),
    tool("now"),
]
CALLS = [("find", {"where": "Paris,\nTexas", "count": 3, "by": "age"}), ("now", {})]


class Bytes:
    """A tokenizer of bytes, an end and the named special tokens."""

    def __init__(self, special: tuple[str, ...]) -> None:
        self.tokens = [bytes([value]) for value in range(256)] + [b"<eos>"] + [token.encode() for token in special]
        self.eos_token_id, self.bos_token_id = 256, None
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.special = {token: 257 + index for index, token in enumerate(special)}

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())

    def ids(self, text: str) -> list[int]:
        pieces = re.split("|".join(f"({re.escape(token)})" for token in self.special) or r"(?!)", text)
        known = [piece for piece in pieces if piece]
        return [n for piece in known for n in ([self.special[piece]] if piece in self.special else piece.encode())]


def accepts(grammar: str, text: str, special: tuple[str, ...] = ()) -> bool:
    tokenizer = Bytes(special)
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(tokenizer)), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.ids(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def answer(form: str, written: Any, calls: Any) -> str:
    """What a model generates: no end token, and nothing that its prompt already holds."""
    text = written(form, "", calls).lstrip("\n").removeprefix("<|start|>assistant")
    for end in ("<|im_end|>", "<|eom_id|>", "</s>", "<｜end▁of▁sentence｜>"):
        text = text.removesuffix(end)
    if form == "gpt-oss":
        text = re.sub(
            r" (to=functions\.\w+)<\|channel\|>commentary json", r"<|channel|>commentary \1 <|constrain|>json", text
        )
    return text.replace("[TOOL_CALLS] [", "[TOOL_CALLS][")


def grammar_of(form: str, tools: Any = TOOLS, **options: Any) -> str:
    special = Bytes(SPECIAL.get(form, ())).special
    return call_grammar(form.removesuffix(" args"), tools, special_tokens=special, **options)


def test_good_calls_are_taken_and_others_are_not(form: str, written: Any) -> None:
    special = SPECIAL.get(form, ())
    grammar = grammar_of(form)
    good = answer(form, written, CALLS[:1])
    assert accepts(grammar, good, special)
    assert accepts(grammar, answer(form, written, CALLS[1:]), special)
    for bad in (
        answer(form, written, [("fined", CALLS[0][1])]),
        answer(form, written, [("find", {"count": 3})]),
        answer(form, written, [("find", {"where": "x", "count": "many"})]),
        answer(form, written, [("find", {"where": "x", "by": "name"})]),
        answer(form, written, [("find", {"where": "x", "other": 1})]),
        good[:-1],
        "Hello",
        "",
    ):
        assert not accepts(grammar, bad, special), bad


def test_several_calls_where_parallel_and_one_named_tool_only(form: str, written: Any) -> None:
    special = SPECIAL.get(form, ())
    both = answer(form, written, CALLS)
    assert accepts(grammar_of(form), both, special)
    assert not accepts(grammar_of(form, parallel=False), both, special)
    assert not accepts(grammar_of(form, TOOLS[1:]), answer(form, written, CALLS[:1]), special)
    factory = make_tool_parser(form.removesuffix(" args"))
    assert factory is not None
    parser = factory(TOOLS)
    parsed = collect(parser.feed(both) + parser.finish())
    assert (parsed.content, [(call.name, json.loads(call.arguments)) for call in parsed.calls]) == ("", CALLS)


def test_reasoning_may_come_first_and_must_end(written: Any) -> None:
    call = answer("hermes", written, CALLS)
    optional, opened = grammar_of("hermes", reasoning="qwen3"), grammar_of("hermes", reasoning="deepseek-r1")
    assert accepts(optional, call)
    assert accepts(optional, "<think>\nif a < b\n</think>\n\n" + call)
    assert not accepts(optional, "<think>" + call)
    assert accepts(opened, "hm\n</think>\n\n" + call)
    assert not accepts(opened, call)
    analysis = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert accepts(grammar_of("gpt-oss"), analysis + answer("gpt-oss", written, CALLS), HARMONY)


POINT = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [({"schema": POINT}, '{"x": 1}', '{"x": 3}'), ({"regex": "a/b|[0-9]{2}"}, "a/b", "a/c")],
    ids=["schema", "regex"],
)
def test_an_answer_of_a_form_comes_after_thoughts(rule: Any, good: str, bad: str) -> None:
    r1, qwen = answer_grammar("deepseek-r1", **rule), answer_grammar("qwen3", **rule)
    for text, taken in ((good, True), (bad, False)):
        assert accepts(r1, f"let me <think> of it\n</think>\n\n{text}") is taken
        assert accepts(qwen, f"<think>\nhm\n</think>\n\n{text}") is taken
        assert accepts(qwen, text) is taken
    assert not accepts(r1, good)
    assert not accepts(r1, f"hm</think>{good} and more")
    assert accepts(answer_grammar("qwen3", prompt="assistant\n<think>\n", **rule), f"hm</think>{good}")
    special = {token: 257 + index for index, token in enumerate(HARMONY)}
    harmony = answer_grammar("gpt-oss", special_tokens=special, **rule)
    final = f"<|channel|>final<|message|>{good}"
    assert accepts(harmony, f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{final}", HARMONY)
    assert accepts(harmony, final, HARMONY)
    assert not accepts(harmony, good, HARMONY)


def test_every_parser_has_a_grammar() -> None:
    for name in TOOL_PARSERS:
        assert call_grammar(name, TOOLS)
    with pytest.raises(ValueError, match="tool_parser = 'x' has no grammar"):
        call_grammar("x", TOOLS)


def test_a_choice_decides_what_is_shown_and_forced() -> None:
    both = tuple(TOOLS)
    assert plan_tools(TOOLS, None) == plan_tools(TOOLS, "auto") == (both, ())
    assert plan_tools(TOOLS, "none") == plan_tools(None, None) == ((), ())
    assert plan_tools(TOOLS, "required") == (both, both)
    assert plan_tools(TOOLS, {"type": "function", "function": {"name": "now"}}) == (both, both[1:])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"type": "function", "function": {"name": "x"}}, r"tool_choice\.function\.name = 'x' is not the name"),
        ("sometimes", "tool_choice = 'sometimes' is invalid"),
    ],
)
def test_wrong_choices_are_named(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_tools(TOOLS, choice)
    with pytest.raises(ValueError, match='"required" needs tools'):
        plan_tools([], "required")


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "retrieval"}], r'tools\[0\]\.type is not "function"'),
        ([{"type": "function"}], r"tools\[0\]\.function is missing"),
        ([tool("a b")], r"tools\[0\]\.function\.name = 'a b' is invalid"),
        ([tool("a" * 65)], r"tools\[0\]\.function\.name"),
        ([tool("a"), tool("a")], r"tools\[1\]\.function\.name = 'a' is another tool's name"),
        ([tool("a", [])], r"tools\[0\]\.function\.parameters is a list"),
        ([tool("a", {"type": "string"})], r"tools\[0\]\.function\.parameters\.type = 'string'"),
        ([tool("a", {"properties": []})], r"tools\[0\]\.function\.parameters\.properties is a list"),
        ([tool("a", {"properties": {"x": {"enum": list(range(1001))}}})], "has 1001 enum values: give at most 1000"),
        ([tool("a", json.loads('{"a":' * 70 + "1" + "}" * 70))], "more than 64 levels deep"),
        ([tool(f"t{index}") for index in range(129)], "tools has 129 entries: give at most 128"),
    ],
)
def test_wrong_tools_are_named(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tools(tools)
