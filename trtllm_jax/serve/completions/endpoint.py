"""POST /v1/completions."""

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.requests.outputs import RequestOutput
from trtllm_jax.requests.sampling_params import SamplingParams
from trtllm_jax.serve.completions.choices import ChoiceFormatter
from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.json_response import json_response
from trtllm_jax.serve.http.limits import check_completion
from trtllm_jax.serve.http.sse import ChunkEncoder, EventStream, merge_streams
from trtllm_jax.serve.http.tracker import RequestTracker, submit_each
from trtllm_jax.serve.protocol.base import names_of
from trtllm_jax.serve.protocol.completions import CompletionRequest, CompletionResponse
from trtllm_jax.serve.sampling import guided_decoding_params, sampling_params
from trtllm_jax.serve.server import Server
from trtllm_jax.serve.usage import usage

_DEFAULT_MAX_TOKENS = 16


async def create_completion(server: Server, request: Request) -> Response:
    """The texts, at once or as a stream."""
    tracker = RequestTracker(server, request, "cmpl-")
    body, large = await read_model(server, request, CompletionRequest)
    model = server.check_model(body.model)
    check_completion(body, server.settings.limits)
    # A constraint takes a while to compile: other requests do not wait for it.
    await tracker.submit(lambda: _submit(tracker, body), in_thread=large or body.response_format is not None)
    formatter = ChoiceFormatter(tracker, body)
    head = tracker.head("text_completion", model)
    if body.stream:
        return EventStream(tracker, _events(tracker, body, formatter, head))
    async with tracker.abort_on_disconnect(request.receive):
        outputs = [await output.aresult() for output in tracker.outputs]
        tracker.raise_if_aborted()
    choices = [
        formatter.whole(output, one, number * (body.n or 1) + one.index)
        for number, output in enumerate(outputs)
        for one in output.outputs
    ]
    return json_response({**head, "choices": choices, "usage": usage(outputs, formatter.shows_output)})


def _submit(tracker: RequestTracker, body: CompletionRequest) -> list[RequestOutput]:
    llm = tracker.server.llm
    tracker.params = params = _sampling_params(body, llm.facts.vocab)
    salt = {"cache_salt": body.cache_salt} if body.cache_salt else {}

    def generate(prompt: Any) -> RequestOutput:
        key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
        return llm.generate_async({key: prompt, **salt}, params, streaming=bool(body.stream))

    return submit_each(body.prompts, names_of("prompt", body.prompt), generate)


def _sampling_params(body: CompletionRequest, vocab: int) -> SamplingParams:
    return sampling_params(
        body,
        vocab,
        add_special_tokens=body.add_special_tokens,
        exclude_input_from_output=not body.echo,
        guided_decoding=guided_decoding_params(body.response_format),
        logprobs=body.logprobs,
        max_tokens=(_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens) or 1,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


async def _events(
    tracker: RequestTracker, body: CompletionRequest, formatter: ChoiceFormatter, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    options = body.stream_options
    encoder = ChunkEncoder(head, usage=options is not None and options.include_usage)
    continuous_usage = options is not None and options.continuous_usage_stats

    def encode(choice: bytes) -> bytes:
        if continuous_usage:
            return encoder.encode_with_usage(choice, usage(tracker.outputs, formatter.shows_output))
        return encoder.encode(choice)

    async def events_of(output: RequestOutput, first_index: int) -> AsyncIterator[bytes]:
        finished: set[int] = set()
        async for step in output:
            running = [one for one in step.outputs if one.index not in finished]
            choices = [formatter.delta(step, one, first_index + one.index) for one in running]
            finished.update(one.index for one in running if one.finish_reason)
            if events := [encode(choice) for choice in choices if choice is not None]:
                yield b"".join(events)

    streams = [events_of(output, number * (body.n or 1)) for number, output in enumerate(tracker.outputs)]
    async for events in merge_streams(streams):
        yield events
    if options is not None and options.include_usage and not tracker.disconnected:
        yield encoder.encode_with_usage(b"", usage(tracker.outputs, formatter.shows_output))


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/completions",
        create_completion,
        "Create a completion",
        request=CompletionRequest,
        response=CompletionResponse,
        event=CompletionResponse,
        errors=BODY_ERRORS,
        generates=True,
    ),
)
