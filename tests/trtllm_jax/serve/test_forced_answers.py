"""Answers that must have a form, from a model of random weights, which has none of its own."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI

from trtllm_jax import LLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 3, "max_tokens": 120}
SHORT = {"extra_body": {"truncate_prompt_tokens": 20}}
"""The tiny model has a token for each byte, and room for 160."""
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rom", "Ulm"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": CITY}}


@pytest.fixture(scope="module")
def calling(tiny_llm: LLM, served: Callable[..., Any]) -> Iterator[OpenAI]:
    app = create_app(tiny_llm, ServeSettings(model_names=("tiny",), tool_parser="hermes"))
    with served(app) as url, OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("seed", range(4))
def test_a_named_function_is_called_once(calling: OpenAI, seed: int) -> None:
    choice = {"type": "function", "function": {"name": "there"}}
    ask = {**ASK, **SHORT, "seed": seed, "tools": [tool("here"), tool("there")], "tool_choice": choice}
    answer = calling.chat.completions.create(**ask).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "there"
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    pieces = [
        piece.function
        for event in calling.chat.completions.create(**ask, stream=True)
        for piece in (event.choices[0].delta.tool_calls or [])
    ]
    assert "".join(piece.name or "" for piece in pieces) == "there"
    assert "".join(piece.arguments or "" for piece in pieces) == call.function.arguments


def test_some_function_is_called(calling: OpenAI) -> None:
    names = set()
    for seed in range(6):
        ask = {**ASK, **SHORT, "seed": seed, "tools": [tool("here"), tool("there")], "tool_choice": "required"}
        message = calling.chat.completions.create(**ask, parallel_tool_calls=False).choices[0].message
        (call,) = message.tool_calls
        names.add(call.function.name)
        jsonschema.validate(json.loads(call.function.arguments), CITY)
    assert names == {"here", "there"}


def form(kind: str, **more: Any) -> dict[str, Any]:
    return {"extra_body": {"response_format": {"type": kind, **more}}}


def test_every_kind_of_format(client: OpenAI) -> None:
    def answer(**more: Any) -> Any:
        return client.chat.completions.create(**ASK, **more).choices[0]

    for wanted in (form("json_schema", json_schema={"name": "city", "schema": CITY}), form("json", schema=CITY)):
        jsonschema.validate(json.loads(answer(**wanted).message.content), CITY)
    assert re.fullmatch("[a-f]{7}", answer(**form("regex", regex="[a-f]{7}")).message.content)
    assert answer(**form("ebnf", ebnf='root ::= "x" "y"')).message.content == "xy"
    assert answer(**form("json_object")).message.content.lstrip().startswith("{")
    assert answer(**form("text")).message.content


def test_a_format_of_a_completion_that_streams(client: OpenAI) -> None:
    wanted = {**form("regex", regex="[0-9]{12}"), "max_tokens": 40}
    events = client.completions.create(model="tiny", prompt="a", stream=True, **wanted)
    assert re.fullmatch("[0-9]{12}", "".join(event.choices[0].text for event in events))


@pytest.mark.parametrize(
    "wanted",
    [
        form("regex", regex="(a"), form("json_schema", json_schema={"name": "x", "schema": {"type": "no"}}),
        form("ebnf", ebnf="nonsense"), form("regex"), form("structural_tag"),
    ],
)  # fmt: skip
def test_a_format_that_cannot_be_is_refused(client: OpenAI, wanted: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError) as error:
        client.chat.completions.create(**ASK, **wanted)
    assert error.value.param.startswith("response_format")
