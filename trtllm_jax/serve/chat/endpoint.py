"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.requests.outputs import CompletionOutput, RequestOutput
from trtllm_jax.serve.chat.prompt import chat_prompt
from trtllm_jax.serve.chat.reader import Reader, Reading
from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.errors import bad, checking
from trtllm_jax.serve.http.exchange import Exchange
from trtllm_jax.serve.http.limits import check_chat
from trtllm_jax.serve.http.sse import Envelope, EventStream, as_json
from trtllm_jax.serve.logprobs import Positions, for_chat
from trtllm_jax.serve.protocol.chat import ChatChunk, ChatRequest, ChatResponse
from trtllm_jax.serve.sampling import guidance, sampling_params
from trtllm_jax.serve.server import Server
from trtllm_jax.serve.token_texts import Places
from trtllm_jax.serve.usage import usage


async def create_chat_completion(server: Server, request: Request) -> Response:
    """The assistant's messages, at once or as a stream."""
    exchange = Exchange(server, request, "chatcmpl-")
    body, heavy = await read_model(request, ChatRequest, server.settings, server.pool)
    model = server.check_model(body.model)
    reading = await converse(exchange, body, heavy)
    head = {
        "id": exchange.id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": exchange.created,
        "model": model,
        "system_fingerprint": server.fingerprint,
    }
    if body.stream:
        return EventStream(exchange, _events(exchange, body, reading, head))
    async with exchange.guarded(request.receive):
        output = await exchange.outputs[0].aresult()
        exchange.check()
    choices = [_choice(exchange, body, reading.start(output.prompt), one) for one in output.outputs]
    whole = {**head, "choices": choices, "usage": usage([output])}
    return Response(as_json(whole), media_type="application/json")


async def converse(exchange: Exchange, body: ChatRequest, heavy: bool) -> Reading:
    """Have the answers to a conversation made; returns how they are read. ApiError where they ask for what is wrong."""
    server = exchange.server
    check_chat(body, server.settings.limits)
    with checking():
        reading = Reading(server, body)
    max_tokens = _max_tokens(body) or server.llm.facts.max_seq_len

    def submit() -> list[RequestOutput]:
        prompt = chat_prompt(server.llm, body, reading.tools)
        exchange.params = params = sampling_params(
            body,
            server.llm.facts.vocab,
            guided_decoding=guidance(body.response_format, reading.grammar(prompt["prompt"], body.response_format)),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            max_tokens=max_tokens,
            skip_special_tokens=body.skip_special_tokens and not reading.keeps_special_tokens,
        )
        return [server.llm.generate_async(prompt, params, streaming=bool(body.stream))]

    # A constraint takes a while to compile: others of this process do not wait for it.
    await exchange.submit(submit, heavy or body.response_format is not None or bool(body.tools))
    return reading


def _max_tokens(body: ChatRequest) -> int | None:
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise bad(
            "max_tokens",
            f"max_tokens = {body.max_tokens} and max_completion_tokens = {body.max_completion_tokens} disagree: give "
            "max_completion_tokens alone",
        )
    return body.max_completion_tokens or body.max_tokens


def _choice(exchange: Exchange, body: ChatRequest, reader: Reader, one: CompletionOutput) -> dict[str, Any]:
    return {
        "index": one.index,
        "message": reader.message(one.text),
        "logprobs": ChatLogprobs(exchange, body).of(one.token_ids, one.logprobs),
        "finish_reason": reader.finish_reason(one.finish_reason),
        "stop_reason": one.stop_reason,
    }


class ChatLogprobs:
    """The log-probabilities of one answer's tokens, as they come."""

    def __init__(self, exchange: Exchange, body: ChatRequest) -> None:
        assert exchange.params is not None
        self._texts = exchange.server.texts
        self._count = (body.top_logprobs or 0) if body.logprobs else None
        self._places = Places(self._texts, exchange.params.skip_special_tokens)

    def of(self, tokens: Sequence[int], positions: Positions) -> dict[str, Any] | None:
        """Those of the next tokens, None where none were asked for."""
        if self._count is None:
            return None
        return for_chat(self._texts, tokens, list(map(self._places.add, tokens)), positions, self._count)


async def _events(
    exchange: Exchange, body: ChatRequest, reading: Reading, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    (output,) = exchange.outputs
    options = body.stream_options
    envelope = Envelope(head, usage=options is not None and options.include_usage)
    counted = options is not None and options.continuous_usage_stats
    readers = [reading.start(output.prompt) for _ in output.outputs]
    logprobs_of = [ChatLogprobs(exchange, body) for _ in output.outputs]
    begun: set[int] = set()
    ended: set[int] = set()

    def event(choice: bytes) -> bytes:
        return envelope.with_usage(choice, usage([output])) if counted else envelope.around(choice)

    def of_one(one: CompletionOutput) -> list[bytes]:
        """The events of what one answer's last step added."""
        finish = one.finish_reason
        reader = readers[one.index]
        first = one.index not in begun
        if reader.plain and not first and not finish and not body.logprobs:
            text = one.text_diff
            return [event(_CONTENT % (one.index, as_json(text)))] if text else []
        deltas = reader.feed(one.text_diff) if one.text_diff else []
        if finish:
            deltas += reader.finish()
        if first:
            begun.add(one.index)
            deltas.insert(0, {"role": "assistant", "content": ""})
        tokens = one.token_ids_diff
        logprobs = logprobs_of[one.index].of(tokens, one.logprobs_diff) if tokens else None
        if logprobs and not deltas[first:]:
            deltas.append({})
        # The tokens of a step go with the last of its deltas: text may be held back, tokens are not.
        choices = [_delta(one.index, delta) for delta in deltas]
        if logprobs:
            choices[-1] = _delta(one.index, deltas[-1], logprobs)
        if finish and finish != "cancelled":
            ended.add(one.index)
            choices.append(_delta(one.index, {}, None, reader.finish_reason(finish), one.stop_reason))
        return [event(choice) for choice in choices]

    async for step in output:
        events = [each for one in step.outputs if one.index not in ended for each in of_one(one)]
        if events:
            yield b"".join(events)
    if options is not None and options.include_usage and not exchange.gone:
        yield envelope.with_usage(b"", usage([output]))


_CONTENT = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'


def _delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
    stop_reason: int | str | None = None,
) -> bytes:
    told = {name: value for name, value in delta.items() if name != "broken"}
    choice = {"index": index, "delta": told, "logprobs": logprobs, "finish_reason": finish}
    return as_json(choice if finish is None else {**choice, "stop_reason": stop_reason})


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
