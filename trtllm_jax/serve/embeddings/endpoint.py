"""POST /v1/embeddings."""

import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.requests.outputs import RequestOutput
from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.errors import bad_request
from trtllm_jax.serve.http.json_response import json_response
from trtllm_jax.serve.http.limits import check_embedding
from trtllm_jax.serve.http.tracker import RequestTracker, submit_each
from trtllm_jax.serve.protocol.base import names_of
from trtllm_jax.serve.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from trtllm_jax.serve.server import Server


async def create_embedding(server: Server, request: Request) -> Response:
    """The prompts' embeddings."""
    tracker = RequestTracker(server, request, "embd-")
    body, large = await read_model(server, request, EmbeddingRequest)
    model = server.check_model(body.model)
    check_embedding(body, server.settings.limits)

    def embed(prompt: Any) -> RequestOutput:
        return server.llm.embed_async(
            prompt, add_special_tokens=body.add_special_tokens, truncate_prompt_tokens=body.truncate_prompt_tokens
        )

    await tracker.submit(lambda: submit_each(body.prompts, names_of("input", body.input), embed), large)
    async with tracker.abort_on_disconnect(request.receive):
        outputs = [await output.aresult() for output in tracker.outputs]
        tracker.raise_if_aborted()
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    data = [
        {"object": "embedding", "index": index, "embedding": _encode(_truncate(output.embedding, body), body)}
        for index, output in enumerate(outputs)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": model, "usage": usage})


def _truncate(embedding: Any, body: EmbeddingRequest) -> Any:
    """The first `dimensions` numbers, normalised again, as Matryoshka models need it (arXiv:2205.13147)."""
    size = body.dimensions
    if size is None or size == len(embedding):
        return embedding
    if size > len(embedding):
        raise bad_request(
            "dimensions", f"dimensions = {size} is too large: this model's embeddings have {len(embedding)}"
        )
    return embedding[:size] / max(np.linalg.norm(embedding[:size]), np.finfo(np.float32).tiny)


def _encode(embedding: Any, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(np.asarray(embedding, "<f4").tobytes()).decode()
    return [float(value) for value in embedding]


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/embeddings",
        create_embedding,
        "Create embeddings",
        request=EmbeddingRequest,
        response=EmbeddingResponse,
        errors=BODY_ERRORS,
        generates=True,
    ),
)
