"""Records that the requests and answers of several endpoints share."""

from typing import Annotated, Any, Literal, overload

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

Count = Annotated[int, Field(ge=1, lt=2**31)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _require_false(value: bool) -> bool:
    if value:
        raise ValueError("this server does not do that: give false, or leave it out")
    return value


OnlyFalse = Annotated[bool, AfterValidator(_require_false), WithJsonSchema({"type": "boolean", "const": False})]
"""A feature of OpenAI's servers that this one lacks; Literal[False] would also take the number 0."""

Texts = str | Annotated[list[str], Field(min_length=1)]
"""A text, or a list of them."""

Prompts = (
    str
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)
"""A text, ids, or a list of either."""


@overload
def as_list(prompts: Texts) -> list[str]: ...


@overload
def as_list(prompts: Prompts) -> list[str] | list[list[int]]: ...


def as_list(prompts: Prompts) -> list[str] | list[list[int]]:
    """The prompts, always as a list."""
    if isinstance(prompts, str):
        return [prompts]
    return [prompts] if isinstance(prompts[0], int) else prompts


def names_of(field: str, prompts: Prompts) -> list[str]:
    """What errors call each prompt of a field: the field itself where it is one prompt, else with the index."""
    listed = as_list(prompts)
    return [f"{field}[{index}]" for index in range(len(listed))] if listed is prompts else [field]


class ApiModel(BaseModel):
    """A record that refuses unknown names, and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(ApiModel):
    """What a stream reports besides the text."""

    include_usage: bool = True
    continuous_usage_stats: bool = False


class JsonSchemaFormat(ApiModel):
    """A JSON schema with its name, as OpenAI has it."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """The format of the answer's text; `schema`, `regex` and `ebnf` go with types "json", "regex" and "ebnf"."""

    type: Literal["text", "json", "json_object", "json_schema", "regex", "ebnf"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    regex: str | None = None
    ebnf: str | None = None


class GenerationRequest(ApiModel):
    """OpenAI's fields, then TensorRT-LLM's further ones, with the defaults that they have there."""

    model: str
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    n: Count | None = None
    presence_penalty: Penalty | None = None
    response_format: ResponseFormat | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Fraction | None = None
    user: str | None = None

    best_of: Count | None = None
    cache_salt: str | None = None
    detokenize: bool = True
    early_stopping: bool | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    length_penalty: float | None = None
    min_p: Fraction | None = None
    min_tokens: CountOrZero | None = None
    no_repeat_ngram_size: CountOrZero | None = None
    prompt_ignore_length: CountOrZero | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stop_token_ids: list[TokenId] | None = None
    top_k: CountOrZero | None = None
    top_p_min: Annotated[float, Field(gt=0, le=1)] | None = None
    truncate_prompt_tokens: Count | None = None
    use_beam_search: bool = False

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class PromptTokensDetails(BaseModel):
    """The number of prompt tokens from the prefix cache."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """The numbers of tokens that were read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorInfo(BaseModel):
    """A failure; `param` is the wrong field of the request, if it is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The answer to a request that failed."""

    error: ErrorInfo


class ModelCard(BaseModel):
    """One name of the model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "trtllm_jax"
    max_model_len: int


class ModelList(BaseModel):
    """The model's names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
