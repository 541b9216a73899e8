"""POST /tokenize and /detokenize, in vLLM's form: what a prompt's ids are, and what ids say."""

import asyncio
from typing import Annotated

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


class TokenizeRequest(ApiModel):
    """A text."""

    model: str
    prompt: str
    add_special_tokens: bool = True


class TokenizeResponse(BaseModel):
    """Its ids, and how many prompt and answer may have together."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(ApiModel):
    """Ids."""

    model: str
    tokens: Annotated[list[TokenId], Field(min_length=1)]


class DetokenizeResponse(BaseModel):
    """Their text, special tokens included."""

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

    def encode() -> list[int]:
        return tokenizer.encode(body.prompt, body.add_special_tokens)

    ids = await asyncio.get_running_loop().run_in_executor(server.pool, encode) if large else encode()
    with bad_request_on_value_error():
        check_ids("prompt", ids, server.llm.facts.vocab, tokenizer)
    whole = {"count": len(ids), "max_model_len": server.llm.facts.max_seq_len, "tokens": ids}
    return json_response(whole)


async def detokenize(server: Server, request: Request) -> Response:
    """The text of ids."""
    body, large = await read_model(server, request, DetokenizeRequest)
    server.check_model(body.model)
    tokenizer = _tokenizer(server)
    if max(body.tokens) >= server.llm.facts.vocab:
        raise bad_request(
            "tokens", f"tokens holds {max(body.tokens)}: ids of this model are 0 to {server.llm.facts.vocab - 1}"
        )

    def decode() -> str:
        return tokenizer.decode(body.tokens, skip_special_tokens=False)

    text = await asyncio.get_running_loop().run_in_executor(server.pool, decode) if large else decode()
    return json_response({"prompt": text})


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
