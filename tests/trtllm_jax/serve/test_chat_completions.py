"""/v1/chat/completions as OpenAI's client sees it: with the tiny model, and with one whose words are given."""

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from trtllm_jax import LLM, SamplingParams
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings

USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def message_of(stream: Any, index: int = 0) -> dict[str, Any]:
    """What the deltas of one choice add up to, as OpenAI's documentation has clients do it."""
    whole: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}, "finish": None, "logprobs": []}
    roles = []
    for event in stream:
        for choice in event.choices:
            if choice.index != index:
                continue
            assert whole["finish"] is None
            delta = choice.delta
            roles.append(delta.role)
            whole["content"] += delta.content or ""
            whole["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                known = whole["tool_calls"].setdefault(call.index, {"id": call.id, "name": "", "arguments": ""})
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""
            whole["finish"] = choice.finish_reason
            whole["logprobs"] += choice.logprobs.content if choice.logprobs else []
    assert roles[0] == "assistant"
    assert not any(roles[1:])
    return whole


def test_the_template_makes_the_prompt(client: OpenAI, tiny_llm: LLM) -> None:
    messages = [
        {"role": "developer", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    prompt = "system: brief\nuser: a\nb\nassistant:"
    expected = tiny_llm.generate(prompt, SamplingParams(max_tokens=9, ignore_eos=True)).outputs[0].text
    ask: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(**ask, max_completion_tokens=9)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "length")
    assert choice.message.tool_calls is None
    assert answer.id.startswith("chatcmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 9)
    streamed = message_of(client.chat.completions.create(**ask, max_tokens=9, stream=True))
    assert (streamed["content"], streamed["finish"]) == (expected, "length")


def test_the_default_length_is_the_rest_of_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[USER], temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == 160


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_bytes_of_every_token(client: OpenAI, tiny_llm: LLM, stream: bool) -> None:
    ask = {"model": "tiny", "messages": [USER], "temperature": 0, "max_tokens": 8, "logprobs": True}
    answer = client.chat.completions.create(**ask, top_logprobs=3, stream=stream, extra_body={"ignore_eos": True})
    got = message_of(answer)["logprobs"] if stream else answer.choices[0].logprobs.content
    direct = tiny_llm.generate(
        "user: hi\nassistant:", SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)
    ).outputs[0]
    alphabet = tiny_llm.tokenizer.hf.backend_tokenizer.decoder
    assert len(got) == 8
    for entry, token, at in zip(got, direct.token_ids, direct.logprobs, strict=True):
        # A byte-level decoder of one token gives the byte itself where that is a character.
        text = alphabet.decode([tiny_llm.tokenizer.hf.convert_ids_to_tokens(token)])
        assert len(entry.bytes) == 1
        assert entry.token == (f"bytes:\\x{entry.bytes[0]:02x}" if text == "\ufffd" else text)
        assert text == "\ufffd" or bytes(entry.bytes).decode() == text
        assert entry.logprob == pytest.approx(at[token].logprob, abs=1e-5)
        assert [one.logprob for one in entry.top_logprobs] == sorted(
            (one.logprob for one in entry.top_logprobs), reverse=True
        )
        assert len(entry.top_logprobs) == 3
    joined = b"".join(bytes(entry.bytes) for entry in got)
    assert joined.decode(errors="replace") == direct.text


def test_several_answers_and_usage_in_a_stream(client: OpenAI) -> None:
    ask = {"model": "tiny", "messages": [USER], "n": 3, "seed": 1, "max_tokens": 6}
    whole = client.chat.completions.create(**ask)
    events = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    for index in range(3):
        assert message_of(events, index)["content"] == whole.choices[index].message.content
    assert events[-1].usage == whole.usage
    assert events[-1].choices == []


def test_a_message_goes_on(client: OpenAI, tiny_llm: LLM) -> None:
    expected = tiny_llm.generate("user: hi\nassistant: So", SamplingParams(max_tokens=4)).outputs[0].text
    answer = client.chat.completions.create(
        model="tiny", messages=[USER, {"role": "assistant", "content": "So"}], temperature=0, max_tokens=4,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )  # fmt: skip
    assert answer.choices[0].message.content == expected


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def test_calls_of_tools(saying: Any) -> None:
    text = f"Let me see.\n{CALL}\n{CALL.replace('Köln', 'Rom')}"
    with saying(text, tool_parser="hermes") as (client, scripted):
        ask: dict[str, Any] = {"model": "tiny", "messages": [USER], "tools": [WEATHER]}
        choice = client.chat.completions.create(**ask).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        first, second = choice.message.tool_calls
        assert (first.function.name, json.loads(first.function.arguments)) == ("weather", {"city": "Köln"})
        assert json.loads(second.function.arguments) == {"city": "Rom"}
        assert first.id != second.id
        assert '"name": "weather"' in scripted.prompts[-1]
        streamed = message_of(client.chat.completions.create(**ask, stream=True))
        assert streamed["content"] == "Let me see."
        assert streamed["finish"] == "tool_calls"
        assert [call["name"] for call in streamed["tool_calls"].values()] == ["weather", "weather"]
        assert json.loads(streamed["tool_calls"][1]["arguments"]) == {"city": "Rom"}
        silent = client.chat.completions.create(**ask, tool_choice="none").choices[0]
        assert (silent.message.content, silent.finish_reason) == (text, "stop")
        assert "weather" not in scripted.prompts[-1]
        results = [
            USER, choice.message,
            *({"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in choice.message.tool_calls),
        ]  # fmt: skip
        client.chat.completions.create(model="tiny", messages=results, tools=[WEATHER])
        assert scripted.prompts[-1].count("tool: rain\n") == 2
        assert scripted.prompts[-1].count('{"city": "K') == 1


@pytest.mark.parametrize("arguments", ['{"city": "Rom"}', '{"city": "Ro', "", None, "absent"])
@pytest.mark.parametrize("content", ["Let me see.", "", None, "absent", [], [{"type": "text", "text": "Let me see."}]])
def test_calls_come_back_as_clients_send_them(saying: Any, arguments: Any, content: Any) -> None:
    function = {"name": "weather"} if arguments == "absent" else {"name": "weather", "arguments": arguments}
    said = {} if content == "absent" else {"content": content}
    call = {"id": "call_1", "type": "function", "function": function}
    answer = {"role": "assistant", **said, "tool_calls": [call], "refusal": None, "audio": None, "annotations": []}
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]}
    with saying("x") as (client, scripted):
        client.chat.completions.create(model="tiny", messages=[USER, answer, result])  # type: ignore[list-item]
    (prompt,) = scripted.prompts
    assert ("Let me see." in prompt) == bool(content and content != "absent")
    assert "tool: rain" in prompt
    assert "None" not in prompt
    assert "null" not in prompt
    wanted = (
        arguments if arguments == '{"city": "Rom"}' else json.dumps(arguments) if arguments == '{"city": "Ro' else "{}"
    )
    assert f'"arguments": {wanted}' in prompt


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "I will not."},
        {"content": [{"type": "refusal", "refusal": "I will not."}]},
        {"content": [{"type": "text", "text": "I will"}, {"type": "refusal", "refusal": "I will not."}]},
    ],
)
def test_a_refusal_is_what_was_said(saying: Any, said: dict[str, Any]) -> None:
    with saying("x") as (client, scripted):
        client.chat.completions.create(model="tiny", messages=[USER, {"role": "assistant", **said}, USER])
    assert "I will not.\nuser: hi" in scripted.prompts[0]


@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": []}, {"reasoning_content": "Hm."}])
def test_an_assistant_may_say_nothing(client: OpenAI, said: dict[str, Any]) -> None:
    messages: Any = [USER, {"role": "assistant", **said}, USER]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=2).choices


def test_calls_of_the_time_before_tools(saying: Any) -> None:
    old: Any = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rom"}'}},
        {"role": "function", "name": "weather", "content": "rain"},
    ]
    with saying("x") as (client, scripted):
        client.chat.completions.create(model="tiny", messages=old)
    assert '"arguments": {"city": "Rom"}' in scripted.prompts[0]
    assert "tool: rain" in scripted.prompts[0]


def test_a_format_that_no_template_tells_follows_from_the_architecture(saying: Any) -> None:
    call = '{"name": "weather", "parameters": {"city": "Rom"}}'
    with saying(call, tool_parser="auto") as (client, _):
        choice = client.chat.completions.create(model="tiny", messages=[USER], tools=[WEATHER]).choices[0]
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Rom"}


def test_a_call_that_breaks_is_content(saying: Any) -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": oh no'
    with saying(text, tool_parser="hermes") as (client, _):
        choice = client.chat.completions.create(model="tiny", messages=[USER], tools=[WEATHER]).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


def test_reasoning_is_told_apart(saying: Any) -> None:
    settings = {"reasoning_parser": "deepseek-r1", "tool_parser": "hermes"}
    with saying(f"Hm, well.</think>\n\nIt rains. {CALL}", **settings) as (client, _):
        ask: dict[str, Any] = {"model": "tiny", "messages": [USER], "tools": [WEATHER]}
        message = client.chat.completions.create(**ask).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm, well.", "It rains.")
        streamed = message_of(client.chat.completions.create(**ask, stream=True))
        assert (streamed["reasoning_content"], streamed["content"]) == ("Hm, well.", "It rains.")
        assert streamed["tool_calls"][0]["name"] == "weather"
        plain = client.chat.completions.create(model="tiny", messages=[USER]).choices[0].message
        assert plain.content == f"It rains. {CALL}"


def test_tools_that_make_no_sense_are_refused(saying: Any, tiny_llm: LLM) -> None:
    def refused(**more: Any) -> Any:
        with pytest.raises(BadRequestError) as error:
            client.chat.completions.create(model="tiny", messages=[USER], **more)
        return error.value.param

    with saying("x", tool_parser="hermes") as (client, _):
        twice = [WEATHER, WEATHER]
        assert refused(tools=twice) == "tools[1].function.name"
        assert refused(tools=[{"type": "function", "function": {"name": "a b"}}]) == "tools[0].function.name"
        other = {"type": "function", "function": {"name": "other"}}
        assert refused(tools=[WEATHER], tool_choice=other) == "tool_choice.function.name"
        assert refused(tool_choice="required") == "tool_choice"
    with saying("x") as (client, _):
        assert refused(tools=[WEATHER], tool_choice="required") == "tool_choice"
        assert client.chat.completions.create(model="tiny", messages=[USER], tools=[WEATHER]).choices[0].message
    with pytest.raises(ValueError, match="tool_parser = 'no'"):
        create_app(tiny_llm, ServeSettings(model_names=("tiny",), tool_parser="no"))


def test_a_model_that_thinks_may_do_so_before_an_answer_of_a_form(saying: Any) -> None:
    schema = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with saying('Hm.</think>{"x": 1}', reasoning_parser="deepseek-r1") as (client, scripted):
        ask: dict[str, Any] = {"model": "tiny", "messages": [USER], "response_format": wanted}
        message = client.chat.completions.create(**ask).choices[0].message
        assert (message.content, message.reasoning_content) == ('{"x": 1}', "Hm.")
        asked = scripted.params.guided_decoding
        assert (asked.name, asked.json) == ("grammar", None)
        assert "</think>" in asked.grammar.replace("\\", "")
    with saying('{"x": 1}') as (client, scripted):
        client.chat.completions.create(**ask)
        assert scripted.params.guided_decoding.json == schema
