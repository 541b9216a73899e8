"""`ResponseBuilder`: a response of /v1/responses and its events, from the answer to a chat."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from trtllm_jax.requests.outputs import CompletionOutput, RequestOutput
from trtllm_jax.serve.chat.logprobs import ChatLogprobs
from trtllm_jax.serve.chat.parser import ChatParser
from trtllm_jax.serve.http.errors import ApiError
from trtllm_jax.serve.http.json_response import as_json
from trtllm_jax.serve.http.tracker import RequestTracker
from trtllm_jax.serve.protocol.chat import ChatRequest
from trtllm_jax.serve.protocol.responses import ResponsesRequest
from trtllm_jax.serve.responses.output import Event, OutputItems
from trtllm_jax.serve.responses.store import StoredResponse


class Conversation(NamedTuple):
    """The items that a response answers, and the digest of the key that it belongs to."""

    owner: str
    items: list[dict[str, Any]]


class ResponseBuilder:
    """One response while it is generated."""

    def __init__(
        self,
        tracker: RequestTracker,
        body: ResponsesRequest,
        chat: ChatRequest,
        parser: ChatParser,
        conversation: Conversation,
    ) -> None:
        self._tracker = tracker
        self._server = tracker.server
        self._body = body
        self._conversation = conversation
        self._parser = parser.message_parser(tracker.outputs[0].prompt)
        self._logprobs = ChatLogprobs(tracker, chat)
        self._items = OutputItems(streamed=bool(body.stream))
        self._events = 0

    def add(self, one: CompletionOutput, *, whole: bool) -> list[Event]:
        """The events of what the last step, or the whole answer, adds."""
        text, tokens = (one.text, one.token_ids) if whole else (one.text_diff, one.token_ids_diff)
        started = [] if self._items.all or not self._parser.is_content_only else self._items.start_message()
        deltas = self._parser.feed(text) if text else []
        if one.finish_reason:
            deltas += self._parser.finish()
        events = [*started, *self._items.feed(deltas, self._message_logprobs(one, tokens, whole))]
        return events + self._items.finish(complete=one.finish_reason != "length") if one.finish_reason else events

    def complete(self, output: RequestOutput) -> dict[str, Any]:
        """The complete response, which is stored where the request asks for it."""
        status = "incomplete" if output.outputs[0].finish_reason == "length" else "completed"
        response = self._response(status, self._items.all, self._usage(output))
        if response["store"]:
            finished = [item for item in self._items.all if item["status"] == "completed" or item["type"] == "message"]
            owner, items = self._conversation
            self._server.responses.put(StoredResponse(owner, response, [*items, *finished]))
        return response

    async def events(self) -> AsyncIterator[bytes]:
        """The events of each step, joined."""
        (output,) = self._tracker.outputs
        response = self._response("in_progress", [], None)
        pieces = [{"type": kind, "response": response} for kind in ("response.created", "response.in_progress")]
        yield b"".join(map(self._encode, pieces))
        finished = False
        async for step in output:
            (one,) = step.outputs
            if finished or one.finish_reason == "cancelled":
                continue
            finished = one.finish_reason is not None
            pieces = self.add(one, whole=False)
            if finished:
                response = self.complete(output)
                pieces.append({"type": f"response.{response['status']}", "response": response})
            if pieces:
                yield b"".join(map(self._encode, pieces))

    def error_event(self, error: ApiError) -> bytes:
        """The event of a failure after the stream has begun."""
        return self._encode({"type": "error", "code": error.code, "message": error.message, "param": error.param})

    def _encode(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": self._events}
        self._events += 1
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), as_json(numbered))

    def _message_logprobs(self, one: CompletionOutput, tokens: list[int], whole: bool) -> list[dict[str, Any]]:
        found = self._logprobs.of(tokens, one.logprobs if whole else one.logprobs_diff)
        return found["content"] if found else []

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        read, written = len(output.prompt_token_ids), output.outputs[0].length
        tokenizer = self._server.llm.tokenizer
        reasoning = self._items.reasoning
        counted = len(tokenizer.encode(reasoning, add_special_tokens=False)) if reasoning and tokenizer else 0
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": output.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": min(counted, written)},
            "total_tokens": read + written,
        }

    def _response(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = self._body
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        choice = body.tool_choice
        return {
            "id": self._tracker.id,
            "object": "response",
            "created_at": self._tracker.created,
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
            "store": body.store is not False and self._server.responses.enabled,
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
