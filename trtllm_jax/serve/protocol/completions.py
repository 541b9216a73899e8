"""/v1/completions: its request and its answers."""

from typing import Literal

from pydantic import BaseModel

from trtllm_jax.serve.protocol.base import CountOrZero, GenerationRequest, Prompts, Usage, as_list


class CompletionRequest(GenerationRequest):
    """A request to complete a prompt: text, ids, or a list of either."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: CountOrZero | None = None
    max_tokens: CountOrZero | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always as a list."""
        return as_list(self.prompt)


class CompletionLogprobs(BaseModel):
    """Each token's text, log-probability, likeliest alternatives, and offset in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text, or in a stream its next part; `token_ids` where detokenize is false."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """The choices; in a stream every event has this form, and `usage` where the request asks for it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
