"""POST /v1/responses, GET and DELETE /v1/responses/ID."""

import hashlib
from collections.abc import AsyncIterator
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.requests.outputs import CompletionOutput, RequestOutput
from trtllm_jax.serve.chat.endpoint import ChatLogprobs, converse
from trtllm_jax.serve.chat.reader import Reading
from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.errors import ApiError, as_api_error, checking
from trtllm_jax.serve.http.exchange import Exchange
from trtllm_jax.serve.http.sse import EventStream, as_json
from trtllm_jax.serve.protocol.chat import ChatRequest
from trtllm_jax.serve.protocol.responses import (
    DeletedResponse,
    InputItem,
    ResponsesAnswer,
    ResponsesEvent,
    ResponsesRequest,
)
from trtllm_jax.serve.responses.input import as_chat, items_of, renamed
from trtllm_jax.serve.responses.output import Event, Items
from trtllm_jax.serve.responses.store import Stored
from trtllm_jax.serve.server import Server

_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


async def create_response(server: Server, request: Request) -> Response:
    """The response, at once or as a stream of events."""
    exchange = Exchange(server, request, "resp_")
    body, heavy = await read_model(request, ResponsesRequest, server.settings, server.pool)
    server.check_model(body.model)
    owner, before = _owner(request), []
    if body.previous_response_id is not None:
        before = server.responses.get(body.previous_response_id, owner, "previous_response_id").items
    items = [*_ITEMS.validate_python(before), *items_of(body)]
    try:
        with checking():
            chat = as_chat(body, items)
        reading = await converse(exchange, chat, heavy)
    except Exception as error:
        told = as_api_error(error, server.settings.retry_after)
        raise error if told is None else renamed(told) from error
    making = Making(exchange, body, chat, reading, owner, [item.model_dump() for item in items])
    if body.stream:
        return EventStream(exchange, making.events(), last=b"", failure=making.failure)
    async with exchange.guarded(request.receive):
        output = await exchange.outputs[0].aresult()
        exchange.check()
    making.take(output.outputs[0], whole=True)
    return Response(as_json(making.ended(output)), media_type="application/json")


async def retrieve_response(server: Server, request: Request) -> Response:
    """A response that was stored."""
    found = server.responses.get(request.path_params["response_id"], _owner(request))
    return Response(as_json(found.response), media_type="application/json")


async def delete_response(server: Server, request: Request) -> Response:
    """Forget a response."""
    number = request.path_params["response_id"]
    server.responses.delete(number, _owner(request))
    return Response(as_json({"id": number, "object": "response", "deleted": True}), media_type="application/json")


def _owner(request: Request) -> str:
    """What tells clients with different keys from each other."""
    return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()


class Making:
    """One response on its way."""

    def __init__(
        self,
        exchange: Exchange,
        body: ResponsesRequest,
        chat: ChatRequest,
        reading: Reading,
        owner: str,
        items: list[dict[str, Any]],
    ) -> None:
        self._exchange = exchange
        self._server = exchange.server
        self._body = body
        self._chat = chat
        self._owner = owner
        self._asked = items
        self._reader = reading.start(exchange.outputs[0].prompt)
        self._logprobs = ChatLogprobs(exchange, chat)
        self._items = Items(streamed=bool(body.stream))
        self._events = 0

    def take(self, one: CompletionOutput, *, whole: bool) -> list[Event]:
        """What a step, or the whole answer, adds."""
        text, tokens = (one.text, one.token_ids) if whole else (one.text_diff, one.token_ids_diff)
        begun = [] if self._items.all or not self._reader.plain else self._items.begin_message()
        deltas = self._reader.feed(text) if text else []
        if one.finish_reason:
            deltas += self._reader.finish()
        events = [*begun, *self._items.feed(deltas, self._written_logprobs(one, tokens, whole))]
        return events + self._items.finish(complete=one.finish_reason != "length") if one.finish_reason else events

    def ended(self, output: RequestOutput) -> dict[str, Any]:
        """The whole response, which is stored where that is wanted."""
        cut = output.outputs[0].finish_reason == "length"
        whole = self._record("incomplete" if cut else "completed", self._items.all, self._usage(output))
        if whole["store"]:
            made = [item for item in self._items.all if item["status"] == "completed" or item["type"] == "message"]
            self._server.responses.put(Stored(self._owner, whole, [*self._asked, *made]))
        return whole

    async def events(self) -> AsyncIterator[bytes]:
        """All events, those of one step together."""
        (output,) = self._exchange.outputs
        begun = self._record("in_progress", [], None)
        pieces = [{"type": kind, "response": begun} for kind in ("response.created", "response.in_progress")]
        yield b"".join(map(self._written, pieces))
        over = False
        async for step in output:
            (one,) = step.outputs
            if over or one.finish_reason == "cancelled":
                continue
            over = one.finish_reason is not None
            pieces = self.take(one, whole=False)
            if over:
                whole = self.ended(output)
                pieces.append({"type": f"response.{whole['status']}", "response": whole})
            if pieces:
                yield b"".join(map(self._written, pieces))

    def failure(self, error: ApiError) -> bytes:
        """The event of what went wrong after the stream had begun."""
        return self._written({"type": "error", "code": error.code, "message": error.message, "param": error.param})

    def _written(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": self._events}
        self._events += 1
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), as_json(numbered))

    def _written_logprobs(self, one: CompletionOutput, tokens: list[int], whole: bool) -> list[dict[str, Any]]:
        found = self._logprobs.of(tokens, one.logprobs if whole else one.logprobs_diff)
        return found["content"] if found else []

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        read, written = len(output.prompt_token_ids), output.outputs[0].length
        tokenizer = self._server.llm.tokenizer
        thought = self._items.thought
        counted = len(tokenizer.encode(thought, add_special_tokens=False)) if thought and tokenizer else 0
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": output.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": min(counted, written)},
            "total_tokens": read + written,
        }

    def _record(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = self._body
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        choice = body.tool_choice
        return {
            "id": self._exchange.id,
            "object": "response",
            "created_at": self._exchange.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": body.store is not False and self._server.responses.remembers,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": choice.model_dump()
            if choice is not None and not isinstance(choice, str)
            else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
        }


_STORED_ERRORS = (400, 401, 404, 500)
ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/responses",
        create_response,
        "Create a response",
        request=ResponsesRequest,
        response=ResponsesAnswer,
        event=ResponsesEvent,
        errors=BODY_ERRORS,
        generates=True,
    ),
    Endpoint(
        "GET",
        "/v1/responses/{response_id}",
        retrieve_response,
        "Retrieve a stored response",
        response=ResponsesAnswer,
        errors=_STORED_ERRORS,
    ),
    Endpoint(
        "DELETE",
        "/v1/responses/{response_id}",
        delete_response,
        "Delete a stored response",
        response=DeletedResponse,
        errors=_STORED_ERRORS,
    ),
)
