"""POST /tokenize and /detokenize, with vLLM's fields."""

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.errors import bad_request, bad_request_on_value_error
from trtllm_jax.serve.http.json_response import json_response
from trtllm_jax.serve.protocol.base import ApiModel, TokenId
from trtllm_jax.serve.server import Server
from trtllm_jax.text.inputs import check_ids
from trtllm_jax.text.tokenizer import Tokenizer

Result = TypeVar("Result")


class TokenizeRequest(ApiModel):
    """A text to tokenize."""

    model: str
    prompt: str
    add_special_tokens: bool = True


class TokenizeResponse(BaseModel):
    """The ids of a text, and the most tokens that prompt and answer may have together."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(ApiModel):
    """Ids to decode."""

    model: str
    tokens: Annotated[list[TokenId], Field(min_length=1)]


class DetokenizeResponse(BaseModel):
    """The text of ids, special tokens included."""

    prompt: str


async def tokenize(server: Server, request: Request) -> Response:
    """The ids of a text."""
    body, large = await read_model(server, request, TokenizeRequest)
    server.check_model(body.model)
    tokenizer = _tokenizer(server)
    if len(body.prompt) > server.settings.limits.prompt_chars:
        raise bad_request(
            "prompt", f"prompt is too long: send at most {server.settings.limits.prompt_chars} characters"
        )

    ids = await _run(server, lambda: tokenizer.encode(body.prompt, body.add_special_tokens), in_thread=large)
    with bad_request_on_value_error():
        check_ids("prompt", ids, server.llm.facts.vocab, tokenizer)
    return json_response({"count": len(ids), "max_model_len": server.llm.facts.max_seq_len, "tokens": ids})


async def detokenize(server: Server, request: Request) -> Response:
    """The text of ids."""
    body, large = await read_model(server, request, DetokenizeRequest)
    server.check_model(body.model)
    tokenizer = _tokenizer(server)
    if max(body.tokens) >= server.llm.facts.vocab:
        raise bad_request(
            "tokens", f"tokens holds {max(body.tokens)}: ids of this model are 0 to {server.llm.facts.vocab - 1}"
        )

    text = await _run(server, lambda: tokenizer.decode(body.tokens, skip_special_tokens=False), in_thread=large)
    return json_response({"prompt": text})


async def _run(server: Server, function: Callable[[], Result], *, in_thread: bool) -> Result:
    """The result of a function, in a thread where all streams would wait for it otherwise."""
    return await asyncio.get_running_loop().run_in_executor(server.pool, function) if in_thread else function()


def _tokenizer(server: Server) -> Tokenizer:
    if server.llm.tokenizer is None:
        raise bad_request(None, "this server has no tokenizer (skip_tokenizer_init): it reads and writes ids only")
    return server.llm.tokenizer


ENDPOINTS = (
    Endpoint(
        "POST",
        "/tokenize",
        tokenize,
        "Tokenize a text",
        request=TokenizeRequest,
        response=TokenizeResponse,
        errors=BODY_ERRORS,
    ),
    Endpoint(
        "POST",
        "/detokenize",
        detokenize,
        "Detokenize ids",
        request=DetokenizeRequest,
        response=DetokenizeResponse,
        errors=BODY_ERRORS,
    ),
)
