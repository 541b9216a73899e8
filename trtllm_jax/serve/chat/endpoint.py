"""POST /v1/chat/completions."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.requests.outputs import CompletionOutput, RequestOutput
from trtllm_jax.serve.chat.logprobs import ChatLogprobs
from trtllm_jax.serve.chat.parser import ChatParser
from trtllm_jax.serve.chat.prompt import chat_prompt
from trtllm_jax.serve.chat.stream import ChatStream
from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.errors import bad_request, bad_request_on_value_error
from trtllm_jax.serve.http.json_response import json_response
from trtllm_jax.serve.http.limits import check_chat
from trtllm_jax.serve.http.sse import EventStream
from trtllm_jax.serve.http.tracker import RequestTracker
from trtllm_jax.serve.protocol.chat import ChatChunk, ChatRequest, ChatResponse
from trtllm_jax.serve.sampling import guided_decoding_params, sampling_params
from trtllm_jax.serve.server import Server
from trtllm_jax.serve.usage import usage


async def create_chat_completion(server: Server, request: Request) -> Response:
    """The assistant's messages, at once or as a stream."""
    tracker = RequestTracker(server, request, "chatcmpl-")
    body, large = await read_model(server, request, ChatRequest)
    model = server.check_model(body.model)
    parser = await submit_chat(tracker, body, large)
    if body.stream:
        stream = ChatStream(tracker, body, parser, tracker.head("chat.completion.chunk", model))
        return EventStream(tracker, stream.events())
    async with tracker.abort_on_disconnect(request.receive):
        output = await tracker.outputs[0].aresult()
        tracker.raise_if_aborted()
    choices = [_choice(tracker, body, parser, output, one) for one in output.outputs]
    return json_response({**tracker.head("chat.completion", model), "choices": choices, "usage": usage([output])})


async def submit_chat(tracker: RequestTracker, body: ChatRequest, large: bool) -> ChatParser:
    """Submit a conversation, and return the parser of its answers; ApiError for a wrong field."""
    server = tracker.server
    check_chat(body, server.settings.limits)
    with bad_request_on_value_error():
        parser = ChatParser(server, body)
    max_tokens = _max_tokens(body) or server.llm.facts.max_seq_len

    def generate() -> list[RequestOutput]:
        prompt = chat_prompt(server.llm, body, parser.tools)
        grammar = parser.grammar(prompt["prompt"], body.response_format)
        tracker.params = params = sampling_params(
            body,
            server.llm.facts.vocab,
            guided_decoding=guided_decoding_params(body.response_format, grammar),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            max_tokens=max_tokens,
            skip_special_tokens=body.skip_special_tokens and not parser.keep_special_tokens,
        )
        return [server.llm.generate_async(prompt, params, streaming=bool(body.stream))]

    # A constraint takes a while to compile: other requests do not wait for it.
    await tracker.submit(generate, in_thread=large or body.response_format is not None or bool(body.tools))
    return parser


def _max_tokens(body: ChatRequest) -> int | None:
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise bad_request(
            "max_tokens",
            f"max_tokens = {body.max_tokens} and max_completion_tokens = {body.max_completion_tokens} disagree: give "
            "max_completion_tokens alone",
        )
    return body.max_completion_tokens or body.max_tokens


def _choice(
    tracker: RequestTracker, body: ChatRequest, parser: ChatParser, output: RequestOutput, one: CompletionOutput
) -> dict[str, Any]:
    message_parser = parser.message_parser(output.prompt)
    return {
        "index": one.index,
        "message": message_parser.message(one.text),
        "logprobs": ChatLogprobs(tracker, body).of(one.token_ids, one.logprobs),
        "finish_reason": message_parser.finish_reason(one.finish_reason),
        "stop_reason": one.stop_reason,
    }


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        create_chat_completion,
        "Create a chat completion",
        request=ChatRequest,
        response=ChatResponse,
        event=ChatChunk,
        errors=BODY_ERRORS,
        generates=True,
    ),
)
