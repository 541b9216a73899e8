"""`ServeSettings`: names, keys, timeouts, and the `Limits` of each request."""

from typing import Annotated

from pydantic import Field

from trtllm_jax.common.strict_model import NonNegativeInt, PositiveInt, StrictModel

Seconds = Annotated[float, Field(gt=0)]


class Limits(StrictModel):
    """Upper limits of one request: a larger request is answered with 400, a larger body with 413.

    Attributes:
        body_bytes: bytes of the body, counted while it is read.
        json_depth: the nesting of arrays and objects.
        prompts: prompts of one completion request.
        prompt_chars: characters of all prompts or messages together.
        messages: messages of one conversation.
        n: answers to each prompt; also the limit of best_of.
        sequences: answers to all prompts together.
        logprobs: alternatives to each token.
        stops: stop strings, and stop ids.
        stop_chars: characters of each stop string.
        biases: entries of logit_bias.
        tools: tools of one request.
        schema_bytes: the size of a JSON schema, a regex or a grammar, as JSON.
        schema_depth: the nesting of a JSON schema.
        template_chars: characters of a request's own chat template.
    """

    body_bytes: PositiveInt = 16 << 20
    json_depth: PositiveInt = 64
    prompts: PositiveInt = 1024
    prompt_chars: PositiveInt = 4_000_000
    messages: PositiveInt = 4096
    n: PositiveInt = 128
    sequences: PositiveInt = 2048
    logprobs: NonNegativeInt = 20
    stops: PositiveInt = 16
    stop_chars: PositiveInt = 1000
    biases: PositiveInt = 1024
    tools: PositiveInt = 128
    schema_bytes: PositiveInt = 64 << 10
    schema_depth: PositiveInt = 32
    template_chars: PositiveInt = 64 << 10


class ServeSettings(StrictModel):
    """One server's settings.

    Attributes:
        model_names: the model's names in requests; answers use the first.
        api_keys: the keys of which `Authorization: Bearer` must have one, except for /health; () requires none.
        request_timeout: seconds from a request's submission to the end of its answer.
        body_timeout: seconds within which a body must arrive.
        retry_after: seconds after which a refused client should try again.
        reasoning_parser: the format of the model's reasoning, None where it does not reason.
        tool_parser: the format of the model's tool calls, None to leave them in the text.
        otlp_traces_endpoint: the URL of an OpenTelemetry collector, None for no traces.
        stored_responses: responses of /v1/responses that this process keeps; 0 where several processes answer.
        stored_bytes: their size together.
        tokenizer_threads: threads for prompts whose tokenisation would delay the streams.
        limits: the limits of each request.
    """

    model_names: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    request_timeout: Seconds = 3600.0
    body_timeout: Seconds = 30.0
    retry_after: PositiveInt = 1
    reasoning_parser: str | None = None
    tool_parser: str | None = None
    otlp_traces_endpoint: str | None = None
    stored_responses: NonNegativeInt = 1000
    stored_bytes: PositiveInt = 64 << 20
    tokenizer_threads: PositiveInt = 2
    limits: Limits = Field(default_factory=Limits)
