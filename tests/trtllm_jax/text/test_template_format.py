"""Whatever a template reads, its prompt holds what the conversation holds, and what transformers would write of it."""

import itertools
import json
import re
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from trtllm_jax.text.chat_formatting import format_messages
from trtllm_jax.text.chat_messages import read_messages
from trtllm_jax.text.message_format import Content, MessageFormat
from trtllm_jax.text.template_format import inspect_template

from .template_styles import STYLES, WITHOUT_CALLS, WITHOUT_TEXT_BESIDE_CALLS

USER = {"role": "user", "content": "Weather in Oslo?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}]


def written(style: str, messages: list[dict[str, Any]]) -> str:
    """The prompt; what a template raises is an error of the test."""
    template = STYLES[style]
    formatted = format_messages(read_messages("messages", messages), inspect_template(template, ()).format)
    return transformers_writes(template, formatted)


def transformers_writes(template: str, messages: list[dict[str, Any]]) -> str:
    (text,), _ = render_jinja_template(conversations=[messages], chat_template=template, tools=TOOLS)
    return str(text)


def call(arguments: Any, call_id: str = "call_8dc4b1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def result(content: Any, call_id: str = "call_8dc4b1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


ARGUMENTS = [{"city": "Oslo"}, '{"city": "Oslo"}', '{"city":"Oslo"}']
EMPTY = [None, "", "null", "{}", {}]
CONTENTS: list[Any] = [{}, {"content": None}, {"content": ""}, {"content": []}, {"content": parts("")}]


@pytest.mark.parametrize("style", STYLES)
class TestEveryStyle:
    @pytest.mark.parametrize(("arguments", "content"), list(itertools.product(ARGUMENTS, CONTENTS)))
    def test_calls(self, style: str, arguments: Any, content: dict[str, Any]) -> None:
        answer = {"role": "assistant", **content, "tool_calls": [call(arguments)]}
        more = [{"role": "assistant", "content": "It rains."}, {"role": "user", "content": "And now?"}]
        assert "And now?" in written(style, [USER, answer, result("rain"), more[1]])
        prompt = written(style, [USER, answer, result("rain"), *more])
        assert "None" not in prompt
        assert "'city'" not in prompt  # as Python would write it
        assert '\\"city' not in prompt  # JSON in JSON
        assert all(word in prompt for word in ("Weather in Oslo?", "rain", "It rains.", "And now?"))
        if style not in WITHOUT_CALLS:
            assert re.search(r"weather.*city.*Oslo.*rain", prompt, re.DOTALL)

    @pytest.mark.parametrize("arguments", EMPTY)
    def test_calls_without_arguments(self, style: str, arguments: Any) -> None:
        answer = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
        prompt = written(style, [USER, answer, result("rain")])
        assert prompt == written(style, [USER, {**answer, "tool_calls": [call({})]}, result("rain")])
        assert not re.search(r"None|null", prompt)

    def test_text_beside_a_call(self, style: str) -> None:
        answer = {"role": "assistant", "content": "Let me see.", "tool_calls": [call('{"city": "Oslo"}')]}
        rains = {"role": "assistant", "content": "It rains."}
        prompt = written(style, [USER, answer, result(parts("rain", "wind")), rains, USER])
        assert all(word in prompt for word in ("rain", "wind", "It rains."))
        assert ("Let me see." in prompt) == (style not in WITHOUT_TEXT_BESIDE_CALLS)
        if style not in WITHOUT_CALLS:
            assert re.search(r"weather.*city.*Oslo.*rain", prompt, re.DOTALL)

    @pytest.mark.parametrize("turned", [False, True])
    def test_several_calls(self, style: str, turned: bool) -> None:
        calls = [call('{"city": "Oslo"}', "call_a1"), call('{"city": "Rom"}', "call_b2")]
        results = [result("rain", "call_a1"), result("sun", "call_b2")]
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        prompt = written(style, [USER, answer, *(reversed(results) if turned else results)])
        assert all(word in prompt for word in ("rain", "sun"))
        if style not in WITHOUT_CALLS:
            assert re.search(r"city.*Oslo.*city.*Rom", prompt, re.DOTALL)
        if style == "one call":  # each result behind its call
            assert re.search(r"Oslo.*rain.*Rom.*sun", prompt, re.DOTALL)

    @pytest.mark.parametrize("content", ["one\ntwo", parts("one", "two"), parts("one\ntwo")])
    def test_text_and_parts(self, style: str, content: Any) -> None:
        answer = {"role": "assistant", "content": content}
        prompt = written(style, [{"role": "user", "content": content}, answer, USER])
        assert prompt.count("one") == prompt.count("two") == 2
        assert "type" not in prompt.replace(json.dumps(TOOLS), "")

    def test_system_messages_anywhere(self, style: str) -> None:
        messages = [("system", "Be brief."), ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"),
                    ("system", "Now rhyme."), ("user", "Go"), ("user", "on")]  # fmt: skip
        prompt = written(style, [{"role": role, "content": content} for role, content in messages])
        assert all(prompt.count(content) == 1 for _, content in messages if len(content) > 2)
        assert written(style, [USER, {"role": "system", "content": "Be brief."}]).count("Be brief.") == 1
        assert "Hello" in written(style, [{"role": "assistant", "content": "Hello"}, USER])

    @pytest.mark.parametrize(
        "said",
        [
            {"content": None, "refusal": "I will not."},
            {"refusal": "I will not."},
            {"content": [{"type": "refusal", "refusal": "I will not."}]},
            {"content": "I will not.", "refusal": None, "tool_calls": None, "function_call": None, "name": None},
            {"content": "I will not.", "tool_calls": []},
        ],
    )
    def test_what_an_assistant_says(self, style: str, said: dict[str, Any]) -> None:
        plain = [USER, {"role": "assistant", "content": "I will not."}, USER]
        assert written(style, [USER, {"role": "assistant", **said}, USER]) == written(style, plain)

    @pytest.mark.parametrize("said", [{}, {"content": None}, {"content": []}, {"reasoning_content": "Hm."}])
    def test_an_assistant_who_says_nothing(self, style: str, said: dict[str, Any]) -> None:
        then = {"role": "user", "content": "And?"}
        prompt = written(style, [USER, {"role": "assistant", **said}, then])
        assert prompt == written(style, [USER, {"role": "assistant", "content": ""}, then])
        assert "And?" in prompt

    def test_calls_of_the_time_before_tools(self, style: str) -> None:
        function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
        old = [USER, {"role": "assistant", "content": None, "function_call": function},
               {"role": "function", "name": "weather", "content": "rain"}]  # fmt: skip
        prompt = written(style, old)
        assert "rain" in prompt
        if style not in WITHOUT_CALLS:
            assert re.search(r"weather.*city.*Oslo.*rain", prompt, re.DOTALL)
        assert "None" not in written(style, [*old[:2], {"role": "function", "name": "weather", "content": None}])


def test_every_format_is_what_its_template_reads() -> None:
    formats = {style: inspect_template(template, ()).format for style, template in STYLES.items()}

    def having(test: Any) -> set[str]:
        return {style for style, format in formats.items() if test(format)}

    assert having(lambda format: format.arguments_as_json) == {"text", "printed", "null with calls", "parts of users"}
    assert having(lambda format: format.empty_content == "null") == {"null with calls"}
    assert having(lambda format: format.empty_content == "absent") == {"absent with calls"}
    assert having(lambda format: format.split_text_and_calls) == {"null with calls", "absent with calls", "one call"}
    assert having(lambda format: format.single_call) == {"one call"}
    assert having(lambda format: format.short_call_ids) == {"short ids", "ids of some length"}
    assert having(lambda format: format.tool_result_names) == {"named results"}
    assert having(lambda format: format.system == "none") == {"short ids"}
    assert having(lambda format: format.system == "one") == {"either content", "ids of some length", "turns"}
    assert having(lambda format: format.alternating_roles) == {"short ids", "turns"}
    assert having(lambda format: format.tool_result_role == "user") == {"three roles", "turns"}
    assert having(lambda format: format.content["user"] is Content.PARTS) == {"parts", "parts of users"}
    assert having(lambda format: format.content["assistant"] is Content.PARTS) == {"parts"}
    assert having(lambda format: format.content["user"] is Content.ONE_PART) == {"one part"}
    assert having(lambda format: format.content["user"] is Content.EITHER) == {"either content"}


@pytest.mark.parametrize(
    ("style", "content"),
    [
        *itertools.product(["object", "either arguments", "either content"], ["", "Let me see."]),
        ("one call", ""),  # it leaves a text out
    ],
)
def test_objects_reach_templates_as_transformers_has_them(style: str, content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content, "tool_calls": [call({"city": "Köln", "n": 1})]},
                result("rain")]  # fmt: skip
    assert written(style, messages) == transformers_writes(STYLES[style], messages)


@pytest.mark.parametrize("text", ['{"city":"Oslo",\n "n": 1.50}', '{"city": "Os', "[1]", '"Oslo"', "5"])
def test_texts_reach_templates_as_they_are(text: str) -> None:
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call(text)]}, result("rain")]
    assert written("text", messages) == transformers_writes(STYLES["text"], messages)


@pytest.mark.parametrize("text", ['{"city": "Os', "[1]", "[" * 100_000])
def test_a_text_that_is_no_object_is_written_as_a_text(text: str) -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [call(text)]}
    assert json.dumps(text) in written("object", [USER, answer])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "call_id", ["c1", "123456789", "call_8dc4b1", "chatcmpl-tool-0123456789abcdef0123456789abcdef", "é"]
)
def test_ids_of_any_length(style: str, call_id: str) -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [call("{}", call_id)]}
    assert "rain" in written(style, [USER, answer, result("rain", call_id)])


def test_short_ids_keep_calls_and_results_together() -> None:
    calls = [call("{}", "call_a1"), call("{}", "abcDEF123")]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    prompt = written("short ids", [USER, answer, result("rain", "call_a1"), result("sun", "abcDEF123")])
    first, second, *results = re.findall(r"(?<=})[a-zA-Z0-9]{9}|(?<=rain)\w{9}|(?<=sun)\w{9}", prompt)
    assert [first, second] == results
    assert second == "abcDEF123"


@pytest.mark.parametrize(
    "template",
    ["", "{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages.clear() }}", "{{ x.y.z }}", "hello",
     "{% for m in messages %}{{ m.content.text }}{% endfor %}"],
)  # fmt: skip
def test_of_odd_templates_nothing_is_known(template: str) -> None:
    traits = inspect_template(template, ())
    assert traits.turn_end == ""
    assert traits.format.content.get("user", Content.TEXT) is Content.TEXT
    assert not traits.format.arguments_as_json
    answer = {"role": "assistant", "content": "", "tool_calls": [call({})]}
    messages = [{"role": "system", "content": "a"}, USER, answer]
    formatted = format_messages(read_messages("messages", messages), traits.format)
    assert formatted == messages


def test_a_template_may_refuse_tools() -> None:
    refusing = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + STYLES["parts"]
    assert inspect_template(refusing, ()) == inspect_template(STYLES["parts"], ())


def test_a_template_is_looked_at_once() -> None:
    template = STYLES["object"] + "{# its own #}"
    assert inspect_template(template, (("bos_token", "<s>"),)) is inspect_template(template, (("bos_token", "<s>"),))
    assert MessageFormat() == inspect_template("", ()).format
