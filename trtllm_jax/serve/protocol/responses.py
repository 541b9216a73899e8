"""/v1/responses: its request and its answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trtllm_jax.serve.protocol.base import ApiModel, Count, CountOrZero, Fraction, OnlyFalse
from trtllm_jax.serve.protocol.chat import ContentPart, LenientModel


class MessageItem(LenientModel):
    """A message of a conversation."""

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
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ContentPart]


class ReasoningItem(LenientModel):
    """The assistant's reasoning, or its summary."""

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
    """The format of the answer's text; a schema goes with "json_schema"."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(ApiModel):
    """The form of the answer."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(LenientModel):
    """How much the model reasons, for templates that use it."""

    effort: str | None = None


class ResponsesRequest(ApiModel):
    """A request for a response: OpenAI's fields, then TensorRT-LLM's further ones."""

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
    """An item of the answer: reasoning, a message or a call."""

    id: str
    type: Literal["reasoning", "message", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(BaseModel):
    """The number of prompt tokens from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """The number of tokens of the reasoning."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """The numbers of tokens that were read and generated."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponsesAnswer(ExtensibleModel):
    """A response with the fields of its request."""

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
    """An event of a stream."""

    type: str
    sequence_number: int


class DeletedResponse(BaseModel):
    """The confirmation that a response is deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
