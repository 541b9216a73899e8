"""What whoever starts a server decides: names, keys, times, and how much a request may ask for."""

from typing import Annotated

from pydantic import Field

from trtllm_jax.common.strict_model import NonNegativeInt, PositiveInt, StrictModel

Seconds = Annotated[float, Field(gt=0)]


class Limits(StrictModel):
    """Most that one request may hold; a request beyond them is answered with 400, a body beyond its size with 413.

    Attributes:
        body_bytes: of the body, counted while it is read.
        json_depth: of arrays and objects within each other.
        prompts: of one completion request.
        prompt_chars: of all prompts or messages together.
        messages: of one conversation.
        n: answers of each prompt, which also bounds best_of.
        sequences: answers of all prompts together.
        logprobs: alternatives of each token.
        stops: stop strings, and stop ids.
        stop_chars: of each stop string.
        biases: entries of logit_bias.
        tools: functions of one request.
        schema_bytes: of a JSON schema, a regex or a grammar, as JSON.
        schema_depth: of a JSON schema.
        template_chars: of a request's own chat template.
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
        model_names: what the model is called in requests and answers; answers use the first.
        api_keys: any of them is asked for, in `Authorization: Bearer`, except by /health; () asks for none.
        request_timeout: seconds from a request's submission to its answer's end.
        body_timeout: seconds in which a body must arrive.
        retry_after: seconds after which a refused client should come again.
        reasoning_parser: the format in which the model thinks aloud, None where it does not.
        tool_parser: the format of the model's tool calls, None to leave them in the text.
        otlp_traces_endpoint: URL of OpenTelemetry's collector, None for no traces.
        stored_responses: of /v1/responses, remembered in this process; 0 where others answer too.
        stored_bytes: of them together.
        tokenizer_threads: for prompts so long that parser them would hold up the streams.
        limits: of each request.
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
