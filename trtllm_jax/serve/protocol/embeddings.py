"""/v1/embeddings: its request and its answer."""

from typing import Literal

from pydantic import BaseModel

from trtllm_jax.serve.protocol.base import ApiModel, Count, Prompts, as_list


class EmbeddingRequest(ApiModel):
    """A request to embed prompts: OpenAI's fields, then vLLM's further ones."""

    model: str
    input: Prompts
    dimensions: Count | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    add_special_tokens: bool = True
    truncate_prompt_tokens: Count | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always as a list."""
        return as_list(self.input)


class Embedding(BaseModel):
    """One prompt's embedding of length one: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """The number of tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The embeddings in the order of the prompts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
