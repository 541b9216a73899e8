"""POST /v1/score, POST /v1/rerank and POST /v1/classify."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.requests.activations import ACTIVATIONS
from trtllm_jax.requests.outputs import RequestOutput, vectors_of
from trtllm_jax.serve.http.body import read_model
from trtllm_jax.serve.http.endpoint import BODY_ERRORS, Endpoint
from trtllm_jax.serve.http.errors import bad_request, bad_request_on_value_error, prompt_errors_name
from trtllm_jax.serve.http.json_response import json_response
from trtllm_jax.serve.http.limits import check_texts
from trtllm_jax.serve.http.tracker import RequestTracker, submit_each
from trtllm_jax.serve.protocol.base import Texts, as_list, names_of
from trtllm_jax.serve.protocol.scoring import (
    ClassifyRequest,
    ClassifyResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)
from trtllm_jax.serve.server import Server


class Side:
    """The first or the second texts of pairs, with the field that holds them and what errors call each."""

    def __init__(self, field: str, texts: Texts) -> None:
        self.field, self.texts, self.names = field, as_list(texts), names_of(field, texts)


async def create_score(server: Server, request: Request) -> Response:
    """The scores of pairs of texts."""
    tracker = RequestTracker(server, request, "score-")
    body, large = await read_model(server, request, ScoreRequest)
    model = server.check_model(body.model)
    firsts, seconds = Side("text_1", body.text_1), Side("text_2", body.text_2)
    scores, usage = await _scores(tracker, request, firsts, seconds, body.truncate_prompt_tokens, large)
    data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)]
    return json_response({**tracker.head("list", model), "data": data, "usage": usage})


async def rerank(server: Server, request: Request) -> Response:
    """The documents that answer a query best."""
    tracker = RequestTracker(server, request, "rerank-")
    body, large = await read_model(server, request, RerankRequest)
    model = server.check_model(body.model)
    query, documents = Side("query", body.query), Side("documents", body.documents)
    scores, usage = await _scores(tracker, request, query, documents, body.truncate_prompt_tokens, large)
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": body.documents[index]}} if body.return_documents else {})
        for index in best
    ]
    return json_response({"id": tracker.id, "model": model, "results": results, "usage": usage})


async def classify(server: Server, request: Request) -> Response:
    """The classes of texts."""
    tracker = RequestTracker(server, request, "classify-")
    body, large = await read_model(server, request, ClassifyRequest)
    model = server.check_model(body.model)
    facts = server.llm.facts
    if facts.task != "classify":
        raise bad_request(
            "model",
            f"{model} is no sequence classifier and has no classes: use /v1/embeddings, /v1/score or /v1/rerank",
        )
    texts = as_list(body.input)
    check_texts("input", texts, server.settings.limits)
    names = names_of("input", body.input)
    outputs, usage = await _encoded(tracker, request, texts, names, body.truncate_prompt_tokens, large)
    probabilities = ACTIVATIONS[facts.class_activation](np.stack(vectors_of(outputs)).astype(np.float64))
    data = [
        {
            "index": index,
            "label": facts.class_names[of_text.argmax()],
            "probs": of_text.tolist(),
            "num_classes": len(of_text),
        }
        for index, of_text in enumerate(probabilities)
    ]
    return json_response({**tracker.head("list", model), "data": data, "usage": usage})


async def _scores(
    tracker: RequestTracker, request: Request, firsts: Side, seconds: Side, truncated: int | None, large: bool
) -> tuple[list[float], dict[str, int]]:
    """The score of each pair, and how many tokens were read."""
    llm = tracker.server.llm
    for side in (firsts, seconds):
        check_texts(side.field, side.texts, tracker.server.settings.limits)
    with prompt_errors_name({"prompt": seconds.field}), bad_request_on_value_error():
        scoring = llm.pair_scoring(firsts.texts, seconds.texts)
    names = [_names(firsts, seconds, prompt) for prompt in scoring.texts_of]
    outputs, usage = await _encoded(tracker, request, scoring.prompts, names, truncated, large)
    return scoring.scores(outputs), usage


async def _encoded(
    tracker: RequestTracker,
    request: Request,
    prompts: Sequence[Any],
    names: Sequence[str | Mapping[str, str]],
    truncated: int | None,
    large: bool,
) -> tuple[list[RequestOutput], dict[str, int]]:
    """The finished output of each prompt, and how many tokens were read."""

    def encode(prompt: Any) -> RequestOutput:
        return tracker.server.llm.encode_async(prompt, truncate_prompt_tokens=truncated)

    await tracker.submit(lambda: submit_each(prompts, names, encode), large)
    async with tracker.abort_on_disconnect(request.receive):
        outputs = [await output.aresult() for output in tracker.outputs]
        tracker.raise_if_aborted()
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return outputs, {"prompt_tokens": tokens, "total_tokens": tokens}


def _names(firsts: Side, seconds: Side, of: tuple[int | None, int | None]) -> str | dict[str, str]:
    """What the request calls a prompt of so many of the first and of the second texts, and the parts of a pair.

    An error about a whole pair, which is that it is too long, is the longer text's.
    """
    first, second = of
    if second is None:
        return firsts.names[first or 0]
    if first is None:
        return seconds.names[second]
    pair = firsts.names[first], seconds.names[second]
    longer = len(firsts.texts[first]) <= len(seconds.texts[second])
    return {"prompt": pair[longer], "prompt.prompt": pair[0], "prompt.text_pair": pair[1]}


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/score",
        create_score,
        "Score pairs of texts",
        request=ScoreRequest,
        response=ScoreResponse,
        errors=BODY_ERRORS,
        generates=True,
    ),
    Endpoint(
        "POST",
        "/v1/rerank",
        rerank,
        "Order documents by relevance",
        request=RerankRequest,
        response=RerankResponse,
        errors=BODY_ERRORS,
        generates=True,
    ),
    Endpoint(
        "POST",
        "/v1/classify",
        classify,
        "Classify texts",
        request=ClassifyRequest,
        response=ClassifyResponse,
        errors=BODY_ERRORS,
        generates=True,
    ),
)
