"""Answers of a random model that must have a form, over HTTP: JSON, expressions, grammars, calls that must come."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from trtllm_jax import LLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings

USER = {"role": "user", "content": "hi"}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": COLOUR}}


@pytest.fixture(scope="module")
def caller(tiny_llm: LLM, served: Any) -> Iterator[OpenAI]:
    settings = ServeSettings(model_names=("tiny",), tool_parser="hermes")
    with served(create_app(tiny_llm, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as one:
        yield one


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_followed(client: OpenAI, stream: bool) -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=[USER], response_format=wrapped, seed=1, stream=stream
    )
    if stream:
        events = list(answer)
        text, finish = (
            "".join(event.choices[0].delta.content or "" for event in events),
            events[-1].choices[0].finish_reason,
        )
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    value = json.loads(text)
    assert finish == "stop"
    assert set(value) == {"colour", "size"}
    assert value["colour"] in ("red", "blue")
    assert 1 <= value["size"] <= 9


@pytest.mark.parametrize(
    ("wanted", "form"),
    [
        ({"type": "regex", "regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"type": "ebnf", "ebnf": 'root ::= "x" ("y" | "z")'}, "x[yz]"),
        ({"type": "json", "schema": {"enum": ["p", "q"]}}, '\\s*"[pq]"\\s*'),
    ],
)
def test_other_forms_are_followed_by_completions(client: OpenAI, wanted: dict[str, Any], form: str) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], n=2, max_tokens=40, extra_body={"response_format": wanted}
    )
    for choice in answer.choices:
        assert re.fullmatch(form, choice.text)
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "regex", "regex": "("},
        {"type": "ebnf", "ebnf": "root ::= nobody"},
        {"type": "json", "schema": {"type": "no such type"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}},
    ],
)
def test_a_form_that_is_none_is_refused(client: OpenAI, wanted: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a", extra_body={"response_format": wanted})
    assert refused.value.param == "response_format"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"paint", "draw"}), ({"type": "function", "function": {"name": "draw"}}, {"draw"})],
    ids=["required", "named"],
)
def test_a_call_that_must_come_comes(caller: OpenAI, choice: Any, names: set[str], stream: bool) -> None:
    answer = caller.chat.completions.create(
        model="tiny", messages=[USER], tools=[tool("paint"), tool("draw")], tool_choice=choice, seed=3,
        stream=stream, max_tokens=150, extra_body={"truncate_prompt_tokens": 8},
        # Who names a function wants one call of it anyway.
        **({"parallel_tool_calls": False} if choice == "required" else {}),
    )  # fmt: skip
    if stream:
        events = [event.choices[0] for event in answer]
        parts = [call.function for event in events for call in event.delta.tool_calls or []]
        called = [("".join(part.name or "" for part in parts), "".join(part.arguments or "" for part in parts))]
        finish = events[-1].finish_reason
    else:
        message, finish = answer.choices[0].message, answer.choices[0].finish_reason
        called = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        assert message.content is None
    ((name, arguments),) = called
    assert finish == "tool_calls"
    assert name in names
    assert json.loads(arguments)["colour"] in ("red", "blue")
