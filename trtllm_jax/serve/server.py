"""`Server`: the state that all endpoints of one application share."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from starlette.types import Scope

from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.logger import logger
from trtllm_jax.serve.http.errors import ApiError, service_unavailable
from trtllm_jax.serve.metrics import Metrics
from trtllm_jax.serve.parsers.registry import (
    ReasoningParserFactory,
    ToolParserFactory,
    make_reasoning_parser,
    make_tool_parser,
)
from trtllm_jax.serve.responses.store import ResponseStore
from trtllm_jax.serve.settings import ServeSettings
from trtllm_jax.serve.token_texts import TokenTexts
from trtllm_jax.serve.tracing import Tracing


def package_version() -> str:
    """The installed package's version."""
    try:
        return version("trtllm-jax")
    except PackageNotFoundError:  # run from a source tree
        return "0"


@dataclass
class Server:
    """One application's state; `draining` is set once no new requests are to be taken.

    Attributes:
        llm: generates the answers.
        settings: the server's settings.
        metrics: the metrics for Prometheus.
        draining: whether the server is shutting down.
        created: when the server started, in seconds since 1970.
    """

    llm: BaseLLM
    settings: ServeSettings
    metrics: Metrics
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.llm.tokenizer)
        model = {"model_type": self.llm.facts.model_type, "chat_template": self.llm.chat_template}
        reasoning, tools = self.settings.reasoning_parser, self.settings.tool_parser
        self.reasoning_parser = make_reasoning_parser(reasoning, **model) if reasoning else None
        self.tool_parser = make_tool_parser(tools, **model) if tools else None
        self._log_parser("reasoning_parser", reasoning, self.reasoning_parser)
        self._log_parser("tool_parser", tools, self.tool_parser)
        self.responses = ResponseStore(self.settings.stored_responses, self.settings.stored_bytes)
        endpoint = self.settings.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint, self.settings.model_names[0])
        self.pool = ThreadPoolExecutor(self.settings.tokenizer_threads, "trtllm_jax-tokenize")
        named = f"{self.settings.model_names[0]} {package_version()} {self.llm.facts}"
        self.system_fingerprint = f"fp_{hashlib.sha256(named.encode()).hexdigest()[:12]}"

    def _log_parser(
        self, option: str, requested: str | None, found: ReasoningParserFactory | ToolParserFactory | None
    ) -> None:
        if requested == "auto":
            logger.info("%s = auto: %s", option, found.name if found else "none, the model gives no sign of one")

    def close(self) -> None:
        """End the threads, once no request is left."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.tracing is not None:
            self.tracing.close()

    def check_ready(self) -> None:
        """ApiError 503 where the server takes no requests."""
        if self.llm.failure is not None:
            raise service_unavailable("the engine failed; the server is about to end", self.settings.retry_after)
        if self.draining:
            raise service_unavailable("the server is shutting down", self.settings.retry_after)

    def check_model(self, name: str) -> str:
        """The name; ApiError 404 where it is not one of the model's."""
        if name not in self.settings.model_names:
            known = ", ".join(map(repr, self.settings.model_names))
            raise ApiError(
                404, f"the model {name[:200]!r} does not exist: use {known}", param="model", code="model_not_found"
            )
        return name

    def log_failure(self, scope: Scope, error: BaseException) -> None:
        """Log an unexpected failure with its traceback; the client gets the request's id only."""
        logger.error("request=%s failed", scope.get("trtllm_jax.request_id"), exc_info=error)
