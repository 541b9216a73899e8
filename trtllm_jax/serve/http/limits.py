"""Checks of a request against the server's `Limits`, before anything is computed for it."""

from collections.abc import Sequence
from typing import Any

from trtllm_jax.serve.http.body import json_length, nested_within
from trtllm_jax.serve.http.errors import bad_request
from trtllm_jax.serve.protocol.base import GenerationRequest, ResponseFormat
from trtllm_jax.serve.protocol.chat import ChatRequest
from trtllm_jax.serve.protocol.completions import CompletionRequest
from trtllm_jax.serve.protocol.embeddings import EmbeddingRequest
from trtllm_jax.serve.settings import Limits


def check_completion(body: CompletionRequest, limits: Limits) -> None:
    """ApiError names the first field that exceeds its limit."""
    prompts = body.prompts
    _check_prompts("prompt", prompts, limits)
    _check_at_most("logprobs", body.logprobs or 0, limits.logprobs)
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens", "max_tokens = 0 gives nothing: use at least 1, or echo = true")
    if body.suffix is not None:
        raise bad_request("suffix", "suffix is not available: put everything that the model should see into prompt")
    _check_generation(body, limits, len(prompts))


def check_embedding(body: EmbeddingRequest, limits: Limits) -> None:
    """ApiError names the first field that exceeds its limit."""
    _check_prompts("input", body.prompts, limits)


def check_texts(param: str, texts: Sequence[str], limits: Limits) -> None:
    """ApiError if there are too many texts, or too long ones."""
    _check_prompts(param, texts, limits, "texts")


def check_chat(body: ChatRequest, limits: Limits) -> None:
    """ApiError names the first field that exceeds its limit."""
    _check_at_most("messages", len(body.messages), limits.messages, "messages")
    chars = sum(
        len(message.content or "")
        if not isinstance(message.content, list)
        else sum(len(part.text or "") for part in message.content)
        for message in body.messages
    )
    _check_at_most("messages", chars, limits.prompt_chars, "characters")
    _check_at_most("top_logprobs", body.top_logprobs or 0, limits.logprobs)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs", f"top_logprobs = {body.top_logprobs} needs logprobs = true")
    _check_at_most("tools", len(body.tools or ()), limits.tools, "tools")
    for i, tool in enumerate(body.tools or ()):
        _check_schema(f"tools[{i}].function.parameters", tool.function.parameters, limits)
    _check_at_most("chat_template", len(body.chat_template or ""), limits.template_chars, "characters")
    _check_generation(body, limits, 1)


def _check_prompts(
    param: str, prompts: Sequence[str] | Sequence[list[int]], limits: Limits, unit: str = "prompts"
) -> None:
    _check_at_most(param, len(prompts), limits.prompts, unit)
    chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    _check_at_most(param, chars, limits.prompt_chars, "characters")


def _check_generation(body: GenerationRequest, limits: Limits, prompts: int) -> None:
    _check_at_most("n", body.n or 1, limits.n)
    _check_at_most("best_of", body.best_of or 1, limits.n)
    sequences = prompts * max(body.n or 1, body.best_of or 1)
    _check_at_most("n", sequences, limits.sequences, "answers of all prompts together")
    _check_at_most("stop", len(body.stops), limits.stops, "stop strings")
    _check_at_most("stop", max(map(len, body.stops), default=0), limits.stop_chars, "characters in one string")
    _check_at_most("stop_token_ids", len(body.stop_token_ids or ()), limits.stops, "ids")
    _check_at_most("logit_bias", len(body.logit_bias or ()), limits.biases, "entries")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options", "stream_options needs stream = true")
    if body.response_format is not None:
        _check_format(body.response_format, limits)


def _check_format(wanted: ResponseFormat, limits: Limits) -> None:
    wrapped = wanted.json_schema and wanted.json_schema.schema_
    _check_schema("response_format.json_schema.schema", wrapped, limits)
    _check_schema("response_format.schema", wanted.schema_, limits)
    for name in ("regex", "ebnf"):
        _check_at_most(f"response_format.{name}", len(getattr(wanted, name) or ""), limits.schema_bytes, "characters")


def _check_schema(param: str, schema: Any, limits: Limits) -> None:
    if schema is None:
        return
    if not nested_within(schema, limits.schema_depth):
        raise bad_request(param, f"{param} is nested more than {limits.schema_depth} deep: make it flatter")
    _check_at_most(param, json_length(schema), limits.schema_bytes, "characters of JSON")


def _check_at_most(param: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        if unit:
            raise bad_request(param, f"{param} has {value} {unit}: send at most {limit}")
        raise bad_request(param, f"{param} = {value} is too large: use at most {limit}")
