"""/v1/responses: its request and its answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trtllm_jax.serve.protocol.base import ApiModel, Count, CountOrZero, Fraction, OnlyFalse
from trtllm_jax.serve.protocol.chat import ContentPart, LenientModel


class MessageItem(LenientModel):
    """Something that was said, by whom."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]


class CallItem(LenientModel):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str | None = None


class CallOutputItem(LenientModel):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]


class ReasoningItem(LenientModel):
    """What the assistant thought; a summary where there is no more."""

    type: Literal["reasoning"]
    content: list[ContentPart] | None = None
    summary: list[ContentPart] | None = None


InputItem = MessageItem | CallItem | CallOutputItem | ReasoningItem


class FunctionTool(ApiModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(ApiModel):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(ApiModel):
    """What the answer's text must be; a schema goes with "json_schema"."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(ApiModel):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(LenientModel):
    """How much the model thinks, for templates that ask."""

    effort: str | None = None


class ResponsesRequest(ApiModel):
    """OpenAI's fields, then TensorRT-LLM's further ones."""

    model: str
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    background: OnlyFalse | None = None
    include: list[str] | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: ReasoningOptions | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    tools: list[FunctionTool] | None = None
    top_logprobs: CountOrZero | None = None
    top_p: Fraction | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None

    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    ignore_eos: bool = False
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    top_k: CountOrZero | None = None
    truncate_prompt_tokens: Count | None = None


class ExtensibleModel(BaseModel):
    """A record of an answer that may have more fields than are named here."""

    model_config = ConfigDict(extra="allow")


class OutputItem(ExtensibleModel):
    """Reasoning, a message, or a call."""

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(BaseModel):
    """How much of the prompt the prefix cache had."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Tokens of the reasoning's text."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """How many tokens were read and written."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponsesAnswer(ExtensibleModel):
    """The answer, with what it was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[OutputItem]
    previous_response_id: str | None
    store: bool
    usage: ResponsesUsage | None


class ResponsesEvent(ExtensibleModel):
    """One event of a stream."""

    type: str
    sequence_number: int


class DeletedResponse(BaseModel):
    """What was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
