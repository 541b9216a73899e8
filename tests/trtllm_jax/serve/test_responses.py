"""/v1/responses by OpenAI's client: answers, streams, what is stored, what is refused."""

import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from trtllm_jax import LLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.config import ServerOptions
from trtllm_jax.serve.settings import Limits, ServeSettings

FREE = {"model": "tiny", "extra_body": {"ignore_eos": True, "top_k": 1}}


def ask(client: OpenAI, given: Any = "hello", **more: Any) -> Response:
    return client.responses.create(input=given, max_output_tokens=12, **{**FREE, **more})


def by_chat(client: OpenAI, messages: list[dict[str, Any]], **more: Any) -> Any:
    answer = client.chat.completions.create(
        messages=messages, max_tokens=12, **{"model": "tiny", "extra_body": {"ignore_eos": True, "top_k": 1}, **more}
    )
    return answer.choices[0].message.content


class TestAnswers:
    def test_a_text_is_a_user_message(self, client: OpenAI) -> None:
        answer = ask(client)
        Response.model_validate(answer.model_dump(), strict=False)
        assert answer.output_text == by_chat(client, [{"role": "user", "content": "hello"}])
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (answer.usage.output_tokens, answer.usage.output_tokens_details.reasoning_tokens) == (12, 0)
        assert answer.usage.total_tokens == answer.usage.input_tokens + 12
        (message,) = answer.output
        assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")

    def test_items_are_the_messages_of_a_chat(self, client: OpenAI) -> None:
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "three"},
            {"role": "developer", "content": "four"},
        ]
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        expected = by_chat(
            client,
            [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "three"},
                {"role": "developer", "content": "four"},
            ],
        )
        assert ask(client, items, instructions="be brief").output_text == expected

    def test_the_text_follows_a_schema(self, client: OpenAI) -> None:
        class Colour(BaseModel):
            name: Literal["red", "green"]

        answer = client.responses.parse(model="tiny", input="a colour", text_format=Colour, max_output_tokens=60)
        assert answer.status == "completed"
        assert answer.output_parsed in (Colour(name="red"), Colour(name="green"))

    def test_log_probabilities(self, client: OpenAI) -> None:
        answer = ask(client, top_logprobs=2, include=["message.output_text.logprobs"])
        (part,) = answer.output[0].content
        assert len(part.logprobs) == 12
        assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in part.logprobs)
        assert bytes(byte for each in part.logprobs for byte in each.bytes).decode(errors="replace") == part.text

    def test_what_was_asked_is_told(self, client: OpenAI) -> None:
        asked = {"temperature": 0.5, "top_p": 0.9, "metadata": {"a": "b"}, "instructions": "x", "user": "me"}
        answer = ask(client, **asked)
        assert {name: getattr(answer, name) for name in asked} == asked


class TestStreams:
    @pytest.mark.parametrize("given", ["hello", "世界 🦙"])
    def test_events_add_up_to_the_answer(self, client: OpenAI, given: str) -> None:
        whole = ask(client, given)
        with client.responses.stream(input=given, max_output_tokens=12, **FREE) as stream:
            events = list(stream)
            final = stream.get_final_response() if whole.status == "completed" else events[-1].response
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events if event.type != "response.output_text.delta"]
        assert kinds == [
            "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
            "response.output_text.done", "response.content_part.done", "response.output_item.done",
            "response.incomplete",
        ]  # fmt: skip
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text == final.output[0].content[0].text
        assert deltas
        assert final.usage == whole.usage.model_copy(update={"input_tokens_details": final.usage.input_tokens_details})

    def test_a_completed_one(self, client: OpenAI) -> None:
        text = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}}}
        with client.responses.stream(model="tiny", input="yes?", text=text, max_output_tokens=20) as stream:
            answer = stream.get_final_response()
        assert json.loads(answer.output_text) in ("yes", "no")

    def test_a_client_that_leaves_ends_it(self, client: OpenAI, tiny_llm: LLM) -> None:
        stream = client.responses.create(input="x", stream=True, max_output_tokens=140, **FREE)
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        stream.close()
        deadline = time.monotonic() + 60
        while tiny_llm._engine._scheduler.has_work:
            assert time.monotonic() < deadline
            time.sleep(0.01)


CALL = '<tool_call>\n{"name": "draw", "arguments": {"colour": "red"}}\n</tool_call>'
DRAW = {
    "type": "function",
    "name": "draw",
    "parameters": {
        "type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"],
        "additionalProperties": False,
    },
}  # fmt: skip


def check(events: list[Any]) -> Response:
    """Every event is numbered, of its item, and adds up to what the end says; returns that."""
    final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in added] == [item.id for item in done] == [item.id for item in final.output]
    parsed = {"parsed_arguments": True, "content": {"__all__": {"parsed"}}}  # the client's own
    assert [item.model_dump() for item in done] == [
        item.model_dump(exclude=parsed if item.type != "reasoning" else None) for item in final.output
    ]
    for index, item in enumerate(final.output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        assert {event.item_id for event in mine if hasattr(event, "item_id")} == {item.id}
        text = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        assert text == (item.arguments if item.type == "function_call" else item.content[0].text)
    return final


class TestTools:
    @pytest.mark.parametrize("stream", [False, True])
    def test_reasoning_text_and_calls_are_items(self, saying: Any, stream: bool) -> None:
        text = f"Hm, well.</think>\n\nIt rains. {CALL}\n{CALL.replace('red', 'blue')}"
        with saying(text, tool_parser="hermes", reasoning_parser="deepseek-r1") as (client, _):
            wishes: dict[str, Any] = {"model": "tiny", "input": "hi", "tools": [DRAW]}
            if stream:
                with client.responses.stream(**wishes) as events:
                    answer = check(list(events))
            else:
                answer = client.responses.create(**wishes)
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        assert answer.output[0].content[0].text == "Hm, well."
        assert answer.output_text.strip() == "It rains."
        assert [json.loads(item.arguments) for item in answer.output[2:]] == [{"colour": "red"}, {"colour": "blue"}]
        assert all(item.status == "completed" for item in answer.output)
        assert answer.status == "completed"

    def test_a_call_that_breaks_is_no_call(self, saying: Any) -> None:
        text = '<tool_call>\n{"name": "draw", "arguments": {"colour": oh no'
        with saying(text, tool_parser="hermes") as (client, _):
            whole = client.responses.create(model="tiny", input="hi", tools=[DRAW])
            assert [item.type for item in whole.output] == ["message"]
            assert "oh no" in whole.output_text
            with client.responses.stream(model="tiny", input="hi", tools=[DRAW]) as events:
                streamed = check(list(events))
        assert [(item.type, item.status) for item in streamed.output if item.type == "function_call"] in (
            [],
            [("function_call", "incomplete")],
        )
        assert "oh no" in streamed.output_text

    @pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "draw"}])
    def test_a_call_that_must_come_comes(self, tiny_llm: LLM, served: Any, choice: Any) -> None:
        settings = ServeSettings(model_names=("tiny",), tool_parser="hermes")
        with served(create_app(tiny_llm, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="x") as client:
            answer = client.responses.create(
                model="tiny", input="hi", tools=[DRAW], tool_choice=choice, max_output_tokens=140,
                parallel_tool_calls=False, extra_body={"truncate_prompt_tokens": 8, "seed": 3},
            )  # fmt: skip
        (call,) = answer.output
        assert (call.type, call.name, answer.status) == ("function_call", "draw", "completed")
        assert json.loads(call.arguments)["colour"] in ("red", "blue")

    def test_a_call_needs_a_parser(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="tool_parser") as caught:
            ask(client, tools=[DRAW], tool_choice="required")
        assert caught.value.param == "tool_choice"


class TestStore:
    def test_a_conversation_goes_on(self, client: OpenAI) -> None:
        first = ask(client)
        following = ask(client, "and?", previous_response_id=first.id)
        expected = by_chat(
            client,
            [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": first.output_text},
                {"role": "user", "content": "and?"},
            ],
        )
        assert following.output_text == expected
        assert following.previous_response_id == first.id

    def test_retrieve_and_delete(self, client: OpenAI) -> None:
        made = ask(client)
        assert client.responses.retrieve(made.id) == made
        client.responses.delete(made.id)
        for use in (lambda: client.responses.retrieve(made.id), lambda: ask(client, previous_response_id=made.id)):
            with pytest.raises(openai.NotFoundError, match="deleted"):
                use()

    def test_what_is_not_to_be_stored_is_not(self, client: OpenAI) -> None:
        made = ask(client, store=False)
        assert made.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)

    def test_the_oldest_make_room(self, tiny_llm: LLM, served: Any) -> None:
        settings = ServeSettings(model_names=("tiny",), stored_responses=2)
        with served(create_app(tiny_llm, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="x") as client:
            first, *others = [ask(client) for _ in range(3)]
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(first.id)
            assert [client.responses.retrieve(each.id).id for each in others] == [each.id for each in others]

    def test_another_key_finds_nothing(self, tiny_llm: LLM, served: Any) -> None:
        settings = ServeSettings(model_names=("tiny",), api_keys=("a", "b"))
        with served(create_app(tiny_llm, settings)) as url:
            mine, yours = (OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in "ab")
            made = ask(mine)
            with pytest.raises(openai.NotFoundError):
                yours.responses.retrieve(made.id)
            assert mine.responses.retrieve(made.id).id == made.id

    def test_several_processes_store_nothing(self, tiny_llm: LLM, served: Any) -> None:
        settings = ServerOptions(served_model_name=("tiny",), num_serve_frontends=2).settings
        with served(create_app(tiny_llm, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="x") as client:
            made = ask(client)
            assert made.store is False
            with pytest.raises(openai.BadRequestError, match="num_serve_frontends"):
                ask(client, previous_response_id=made.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": "x" * 200}, "input"),
        ({"input": "x" * 4_000_001}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"a": [[[[[0]]]]]}}}}, "text.format.schema"),
        ({"conversation": "conv_1"}, "conversation"),
    ],
)
def test_what_is_wrong_is_named(tiny_llm: LLM, small: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = small.post("/v1/responses", json={"model": "tiny", "input": "x", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.fixture(scope="module")
def small(tiny_llm: LLM, served: Any) -> Iterator[httpx.Client]:
    settings = ServeSettings(model_names=("tiny",), limits=Limits(schema_depth=4))
    with served(create_app(tiny_llm, settings)) as url, httpx.Client(base_url=url) as client:
        yield client


class TestSentBack:
    """What this server and OpenAI's answered is taken as a part of a conversation."""

    @pytest.mark.parametrize(
        "items",
        [
            [{"type": "function_call", "call_id": "c1", "name": "draw", "arguments": '{"colour": "red"}'},
             {"type": "function_call_output", "call_id": "c1", "output": "done"}],
            [{"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "draw", "arguments": "",
              "status": "completed"},
             {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "done"}]}],
            [{"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}],
            [{"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}],
            [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x", "status": None}],
            [{"type": "reasoning", "id": "rs_1", "summary": [], "content": None},
             {"type": "function_call", "call_id": "c1", "name": "draw", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "c1", "output": "done"}],
            [{"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": []}],
            [{"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
              "content": [{"type": "refusal", "refusal": "I will not."}]}],
        ],
    )  # fmt: skip
    def test_items(self, client: OpenAI, items: list[dict[str, Any]]) -> None:
        assert ask(client, [{"role": "user", "content": "hi"}, *items, {"role": "user", "content": "go"}]).output

    @pytest.mark.parametrize("text", ["Hm, well.", f"Hm.</think>{CALL}", "Hm.</think>Yes.", "</think>", ""])
    def test_its_own_answers(self, saying: Any, text: str) -> None:
        with saying(text or " ", tool_parser="hermes", reasoning_parser="deepseek-r1") as (client, scripted):
            first = client.responses.create(model="tiny", input="hi", tools=[DRAW])
            mine = [item.model_dump(exclude_none=True) for item in first.output]
            following = [{"role": "user", "content": "hi"}, *mine, {"role": "user", "content": "and?"}]
            client.responses.create(model="tiny", input=following, tools=[DRAW])
            sent = scripted.prompts[-1]
            client.responses.create(model="tiny", input="and?", previous_response_id=first.id, tools=[DRAW])
        assert scripted.prompts[-1] == sent
        assert ("Yes." in sent, '"colour": "red"' in sent) == ("Yes." in text, "draw" in text)

    def test_a_refusal_is_what_was_said(self, saying: Any) -> None:
        said = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}
        with saying("x") as (client, scripted):
            client.responses.create(model="tiny", input=[{"role": "user", "content": "hi"}, said])
        assert "assistant: I will not." in scripted.prompts[-1]
