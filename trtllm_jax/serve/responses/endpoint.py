"""POST /v1/responses, GET and DELETE /v1/responses/ID."""

import hashlib

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.serve.chat.endpoint import submit_chat
from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.errors import as_api_error, bad_request_on_value_error
from trtllm_jax.serve.http.json_response import json_response
from trtllm_jax.serve.http.sse import EventStream
from trtllm_jax.serve.http.tracker import RequestTracker
from trtllm_jax.serve.protocol.responses import (
    DeletedResponse,
    InputItem,
    ResponsesAnswer,
    ResponsesEvent,
    ResponsesRequest,
)
from trtllm_jax.serve.responses.builder import Conversation, ResponseBuilder
from trtllm_jax.serve.responses.input import in_responses_terms, input_items, to_chat_request
from trtllm_jax.serve.server import Server

_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


async def create_response(server: Server, request: Request) -> Response:
    """The response, at once or as a stream of events."""
    tracker = RequestTracker(server, request, "resp_")
    body, large = await read_model(server, request, ResponsesRequest)
    server.check_model(body.model)
    owner, previous = _owner(request), []
    if body.previous_response_id is not None:
        previous = server.responses.get(body.previous_response_id, owner, "previous_response_id").items
    items = [*_ITEMS.validate_python(previous), *input_items(body)]
    try:
        with bad_request_on_value_error():
            chat = to_chat_request(body, items)
        parser = await submit_chat(tracker, chat, large)
    except Exception as error:
        api_error = as_api_error(error, server.settings.retry_after)
        raise error if api_error is None else in_responses_terms(api_error) from error
    conversation = Conversation(owner, [item.model_dump() for item in items])
    builder = ResponseBuilder(tracker, body, chat, parser, conversation)
    if body.stream:
        return EventStream(tracker, builder.events(), last=b"", error_event=builder.error_event)
    async with tracker.abort_on_disconnect(request.receive):
        output = await tracker.outputs[0].aresult()
        tracker.raise_if_aborted()
    builder.add(output.outputs[0], whole=True)
    return json_response(builder.complete(output))


async def retrieve_response(server: Server, request: Request) -> Response:
    """A response that was stored."""
    return json_response(server.responses.get(request.path_params["response_id"], _owner(request)).response)


async def delete_response(server: Server, request: Request) -> Response:
    """Delete a stored response."""
    response_id = request.path_params["response_id"]
    server.responses.delete(response_id, _owner(request))
    return json_response({"id": response_id, "object": "response", "deleted": True})


def _owner(request: Request) -> str:
    """A digest of the client's key, which tells clients with different keys from each other."""
    return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()


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
