"""What is wrong with a request is said in OpenAI's form, with the field, before anything runs; others go on."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI

from tests.trtllm_jax.tiny_engine import held
from trtllm_jax import LLM, EngineBusyError, EngineDeadError, RequestError, RequestOutput
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.completions import endpoint as completions
from trtllm_jax.serve.http.errors import ApiError, bad_request, prompt_errors_name
from trtllm_jax.serve.settings import Limits, ServeSettings

COMPLETION = {"model": "tiny", "prompt": "x", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def told(answer: httpx.Response, status: int, **expected: Any) -> str:
    """The message of an error; its form and the given fields are checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert {name: error["error"][name] for name in expected} == expected
    assert answer.headers["x-request-id"]
    return str(error["error"]["message"])


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 2}, "top_p", "less than or equal to 1"),
        ({"n": 0}, "n", "greater"),
        ({"n": 129}, "n", "at most 128"),
        ({"n": 2, "temperature": 0}, "n", "equal answers"),
        ({"n": 2, "best_of": 1}, "best_of", "at least n"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"min_tokens": 9}, "min_tokens", "at most max_tokens"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", ""),
        ({"stop": 5}, "stop", ""),
        ({"seed": 2**64}, "seed", "less than"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"use_beam_search": True}, "use_beam_search", "not available"),
        ({"suffix": "s"}, "suffix", "not available"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a field"),
        ({"foo": 1}, "foo", "not a field"),
        ({"functions": []}, "functions", "not a field"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": []}, "prompt", "prompt is empty: give at least one entry"),
        ({"prompt": [[]]}, "prompt[0]", "prompt[0] is empty: give at least one entry"),
        ({"prompt": [1, "a"]}, "prompt[1]", ""),
        ({"prompt": [258]}, "prompt", "0 to 257"),
        ({"prompt": [-1]}, "prompt[0]", "greater"),
        ({"prompt": 5}, "prompt", ""),
        ({"prompt": "x" * 200}, "prompt", "max_seq_len is 160"),
        ({"prompt": ["ok", "x" * 200]}, "prompt[1]", "max_seq_len is 160"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "input should be"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, fields: dict[str, Any], param: str, says: str) -> None:
    message = told(
        http.post("/v1/completions", json={**COMPLETION, **fields}), 400, type="invalid_request_error", param=param
    )
    assert says in message


def test_a_whole_number_may_be_written_with_a_point(http: httpx.Client) -> None:
    body = b'{"model":"tiny","prompt":[1.0,2e0],"max_tokens":3.0,"seed":1.8e19,"temperature":1.0,"ignore_eos":true}'
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == 5


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "messages is empty: give at least one entry"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role", "input should be"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "not available",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ""),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": 2}, "logprobs", "boolean"),
        ({"max_completion_tokens": 3}, "max_tokens", "disagree"),
        ({"chat_template": "{{ messages }}"}, "chat_template", "refused"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "no variable"),
        ({"continue_final_message": True}, "continue_final_message", "exclude each other"),
        ({"tool_choice": "required"}, "tool_choice", ""),
        ({"add_special_tokens": True}, "add_special_tokens", ""),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools[0].function.x", "not a field"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(http: httpx.Client, fields: dict[str, Any], param: str, says: str) -> None:
    message = told(http.post("/v1/chat/completions", json={**CHAT, **fields}), 400, param=param)
    assert says in message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "send an object"),
        (b"null", "send an object"),
        (b'{"model":"tiny","prompt":"x","temperature":NaN}', "NaN is not a number"),
        (b'{"model":"tiny","prompt":"x","temperature":-Infinity}', "-Infinity"),
        (b'{"model":"tiny","prompt":"x","temperature":1e999}', "too large"),
        (b'{"model":"tiny","prompt":"x","n":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"model":"tiny","prompt":"x","n":' + b"9" * 400 + b"}", "n = "),
        (b'{"model":"tiny","prompt":"x","prompt":"y"}', "'prompt' is given twice"),
        (b'{"model":"tiny","prompt":"\xff"}', "UTF-8"),
        (b'{"model":"tiny","prompt":"\\ud800"}', "surrogate"),
        (b'{"\\udc00":1}', "surrogate"),
        (b"[" * 100_000, "deep"),
        (b'{"model":"tiny","prompt":"x","foo":' + b"[" * 70 + b"]" * 70 + b"}", "more than 64 deep"),
    ],
    ids=lambda value: value[:12].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_json_must_be_clear(http: httpx.Client, body: bytes, says: str) -> None:
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert says in told(answer, 400)


def test_other_refusals(http: httpx.Client, client: OpenAI) -> None:
    raw = json.dumps(COMPLETION)
    told(http.post("/v1/completions", content=raw, headers={"content-type": "text/plain"}), 415)
    told(http.post("/v1/completions", content=raw), 415)
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    told(http.post("/v1/completions", content=raw, headers=packed), 415)
    told(http.post("/v1/completion", json=COMPLETION), 404, code=None)
    told(http.get("/v1/completions"), 405)
    for method, path, allowed in (
        ("HEAD", "/metrics", "GET"),
        ("PUT", "/v1/responses/resp_1", "DELETE, GET"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ):
        refused = http.request(method, path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
    told(http.post("/v1/completions", json={**COMPLETION, "model": "gpt"}), 404, param="model", code="model_not_found")
    told(http.get("/v1/models/nobody"), 404, code="model_not_found")
    assert http.get("/v1/models/tiny/alias").json()["max_model_len"] == 160
    assert [model.id for model in client.models.list()] == ["tiny", "tiny/alias"]
    assert client.models.retrieve("tiny").owned_by == "trtllm_jax"


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")


@pytest.mark.slow
def test_a_body_may_not_be_too_large_or_too_slow(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    settings = ServeSettings(model_names=("tiny",), body_timeout=3, limits=Limits(body_bytes=1000))
    with served(create_app(tiny_llm, settings)) as url, httpx.Client(base_url=url) as http:
        told(http.post("/v1/completions", json={**COMPLETION, "prompt": "x" * 2000}), 413)
        parts = iter([b'{"model":"tiny","prompt":"', *[b"x" * 100] * 20, b'"}'])
        kind = {"content-type": "application/json"}
        told(http.post("/v1/completions", content=parts, headers=kind), 413, code="body_too_large")
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n5\r\n{    \r\n"
            )
            assert http.post("/v1/completions", json=COMPLETION).status_code == 200
            assert b" 408 " in slow.recv(1000).splitlines()[0]


def test_keys(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    settings = ServeSettings(model_names=("tiny",), api_keys=("secret", "other"))
    with served(create_app(tiny_llm, settings)) as url, httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Bearer"},
        ):
            for path in ("/v1/models", "/metrics", "/prometheus/metrics", "/openapi.json", "/nothing"):
                told(http.get(path, headers=headers), 401, code="invalid_api_key")
        for key in ("secret", "other"):
            assert http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{url}/v1", api_key="nope", max_retries=0).models.list()


class Broken:
    """An `LLM` whose engine answers nobody: every request fails as told."""

    def __init__(self, llm: LLM, error: Exception) -> None:
        self.failure: Exception | None = None
        self.facts, self.tokenizer, self.chat_template, self._error = llm.facts, llm.tokenizer, None, error

    def generate_async(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EngineBusyError("the queue is full"), 429, "rate_limit_error"),
        (EngineDeadError("gone: secret"), 503, "service_unavailable_error"),
        (RuntimeError("LLM is shutting down"), 503, "service_unavailable_error"),
        (RuntimeError("secret"), 500, "server_error"),
        (KeyError("secret"), 500, "server_error"),
    ],
)
def test_an_engine_that_refuses(
    tiny_llm: LLM, served: Callable[..., Any], error: Exception, status: int, kind: str
) -> None:
    app = create_app(Broken(tiny_llm, error), ServeSettings(model_names=("tiny",), retry_after=7))  # type: ignore[arg-type]
    with served(app) as url, httpx.Client(base_url=url) as http:
        for stream in (False, True):
            answer = http.post(
                "/v1/completions", json={**COMPLETION, "stream": stream}, headers={"x-request-id": "mine-1"}
            )
            assert "secret" not in told(answer, status, type=kind)
            assert answer.headers["x-request-id"] == "mine-1"
            assert ("mine-1" in answer.text) == (status == 500)
            assert answer.headers.get("retry-after") == ("7" if status in (429, 503) else None)


def test_a_fault_of_our_own_is_not_the_requests(
    tiny_llm: LLM, served: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(completions, "usage", broken)
    with served(create_app(tiny_llm, ServeSettings(model_names=("tiny",)))) as url, httpx.Client(base_url=url) as http:
        assert "secret" not in told(http.post("/v1/completions", json=COMPLETION), 500, type="server_error")
        streamed = {**COMPLETION, "stream": True, "stream_options": {"include_usage": True}}
        answer = http.post("/v1/completions", json=streamed)
        assert answer.status_code == 200
        last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["type"] == "server_error"
        assert "secret" not in answer.text
    wait_until_idle(tiny_llm)


def test_what_the_engine_finds_wrong_later_is_the_requests(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    app = create_app(Broken(tiny_llm, RequestError("too much")), ServeSettings(model_names=("tiny",)))  # type: ignore[arg-type]
    with served(app) as url, httpx.Client(base_url=url) as http:
        assert "too much" in told(http.post("/v1/completions", json=COMPLETION), 400, type="invalid_request_error")


def test_health_follows_the_engine_and_the_end(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    llm = Broken(tiny_llm, EngineDeadError("gone"))
    app = create_app(llm, ServeSettings(model_names=("tiny",)))  # type: ignore[arg-type]
    with served(app) as url, httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 200
        app.state.server.draining = True
        told(http.get("/health"), 503)
        told(http.post("/v1/completions", json=COMPLETION), 503)
        app.state.server.draining = False
        llm.failure = EngineDeadError("gone")
        told(http.get("/health"), 503)
        told(http.get("/health_generate"), 503)
        assert http.get("/v1/models").status_code == 200


def test_time_runs_out(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    app = create_app(tiny_llm, ServeSettings(model_names=("tiny",), request_timeout=0.02))
    long = {**COMPLETION, "max_tokens": 150, "ignore_eos": True, "n": 8}
    with served(app) as url, httpx.Client(base_url=url, timeout=None) as http:
        told(http.post("/v1/completions", json=long), 504, type="timeout_error")
        streamed = http.post("/v1/completions", json={**long, "stream": True})
        if streamed.status_code == 200:
            assert '"type":"timeout_error"' in streamed.text.split("data: ")[-1]
            with pytest.raises(openai.APIError, match="not complete"):
                list(OpenAI(base_url=f"{url}/v1", api_key="x").completions.create(
                    model="tiny", prompt="x", max_tokens=150, n=8, stream=True, extra_body={"ignore_eos": True}
                ))  # fmt: skip
        else:
            told(streamed, 504)
    wait_until_idle(tiny_llm)


def wait_until_idle(llm: LLM) -> None:
    """Until no sequence holds pages; fails after 60 s."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        llm.generate([1], use_tqdm=False)
        if llm.get_stats()[-1]["numActiveRequests"] <= 1:
            return
        threading.Event().wait(0.05)
    raise AssertionError("sequences still run")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(
    tiny_llm: LLM, address: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, outputs = tiny_llm.generate_async, list[RequestOutput]()

    def watched(*arguments: Any, **options: Any) -> RequestOutput:
        outputs.append(generate(*arguments, **options))
        return outputs[-1]

    monkeypatch.setattr(tiny_llm, "generate_async", watched)
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "tiny", "prompt": "x", "max_tokens": 150, "n": 4, "ignore_eos": True, "stream": stream}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    tiny_llm.get_stats()
    sockets = [socket.create_connection((host, int(port)), timeout=60) for _ in range(6)]
    with held(tiny_llm, after=4):
        for each in sockets:
            each.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert b" 200 " in sockets[0].recv(100)
        while len(outputs) < 6:
            threading.Event().wait(0.01)
        for each in sockets:
            each.close()
        while not all(output.aborted() for output in outputs):
            threading.Event().wait(0.01)
    wait_until_idle(tiny_llm)
    generated = sum(step["inflightBatchingStats"]["numGenRequests"] for step in tiny_llm.get_stats())
    assert generated < 6 * 4 * 150


def test_an_engine_that_dies_within_a_stream(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    """The client is told, in the stream."""
    begun = threading.Event()

    class Dying(Broken):
        def generate_async(self, *args: Any, **kwargs: Any) -> Any:
            output = tiny_llm.generate_async(*args, **kwargs)
            deliver, count = output._deliver, 0

            def dying(delta: Any) -> None:
                nonlocal count
                count += 1
                if count == 3:
                    assert begun.wait(60)  # what comes before the first event is an answer of its own
                deliver(delta if count < 3 else delta._replace(error=EngineDeadError("secret")))

            output._deliver = dying  # type: ignore[method-assign]
            return output

    app = create_app(Dying(tiny_llm, ValueError()), ServeSettings(model_names=("tiny",)))  # type: ignore[arg-type]
    with served(app) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(
            model="tiny", prompt="x", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError, match="the engine failed") as failed:
            [begun.set() for _ in stream]
        assert failed.value.body["type"] == "service_unavailable_error"
    wait_until_idle(tiny_llm)


def test_a_message_begins_with_the_requests_own_name() -> None:
    """And not with the library's in addition, where the message begins with that."""
    for message, expected in (
        ("prompt.prompt holds nothing", "text_1 holds nothing"),
        ("too long", "text_1: too long"),
    ):
        with pytest.raises(ApiError) as found, prompt_errors_name({"prompt.prompt": "text_1"}):
            raise bad_request("prompt.prompt", message)
        assert (found.value.param, found.value.message) == ("text_1", expected)
