"""/v1/chat/completions: its request and its answers."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from trtllm_jax.serve.protocol.base import ApiModel, Count, CountOrZero, GenerationRequest, OnlyFalse, Usage


class LenientModel(BaseModel):
    """A record that clients may send back with fields of their own, which are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class CalledFunction(LenientModel):
    """The name of a called function, and its arguments as JSON text."""

    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(LenientModel):
    """A call that the assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ContentPart(LenientModel):
    """A part of a message; only text is supported in this release."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(LenientModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    function_call: CalledFunction | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, validation_alias=AliasChoices("reasoning_content", "reasoning"))


class Function(ApiModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiModel):
    """A tool, which is always a function."""

    type: Literal["function"]
    function: Function


class FunctionName(ApiModel):
    """The name of a function."""

    name: str


class NamedToolChoice(ApiModel):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationRequest):
    """A request to answer a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: CountOrZero | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    store: OnlyFalse | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    tools: list[Tool] | None = None

    add_generation_prompt: bool = True
    add_special_tokens: OnlyFalse = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    documents: list[dict[str, str]] | None = None
    reasoning_effort: str | None = None


class TopLogprob(BaseModel):
    """A candidate token; `bytes` are its UTF-8, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A generated token with the likeliest candidates in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of each token."""

    content: list[TokenLogprob]
    refusal: None = None


class ToolCall(BaseModel):
    """A call that the client should make."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None


class ChatResponse(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ToolCallDelta(BaseModel):
    """The beginning of a call (id, type and name), or more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: dict[str, str]


class ChatDelta(BaseModel):
    """The part of a message that an event adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """The part of one answer that an event adds."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: int | str | None = None


class ChatChunk(BaseModel):
    """An event of a stream; the last one may have the usage and no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
