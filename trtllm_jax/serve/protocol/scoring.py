"""/v1/score, /v1/rerank and /v1/classify: their requests and answers, as vLLM and Jina have them."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from trtllm_jax.serve.protocol.base import ApiModel, Count, Texts
from trtllm_jax.serve.protocol.embeddings import EmbeddingUsage


class ScoreRequest(ApiModel):
    """Pairs of texts to score: `text_1` is one for all of `text_2`, or one for each."""

    model: str
    text_1: Texts
    text_2: Texts
    truncate_prompt_tokens: Count | None = None
    user: str | None = None


class PairScore(BaseModel):
    """The score of one pair."""

    object: Literal["score"] = "score"
    index: int
    score: float


class ScoreResponse(BaseModel):
    """The scores in the order of the pairs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PairScore]
    usage: EmbeddingUsage


class RerankRequest(ApiModel):
    """Documents to put in order by how well they answer a query; the best `top_n` are returned, all by default."""

    model: str
    query: str
    documents: Annotated[list[str], Field(min_length=1)]
    top_n: Count | None = None
    return_documents: bool = True
    truncate_prompt_tokens: Count | None = None
    user: str | None = None


class Document(BaseModel):
    """A document's text."""

    text: str


class RankedDocument(BaseModel):
    """One document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """The documents, best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage


class ClassifyRequest(ApiModel):
    """Texts to classify."""

    model: str
    input: Texts
    truncate_prompt_tokens: Count | None = None
    user: str | None = None


class Classification(BaseModel):
    """One text's likeliest class, and what the model gives each class, in the order of config.json's id2label."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(BaseModel):
    """The classes in the order of the texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: EmbeddingUsage
