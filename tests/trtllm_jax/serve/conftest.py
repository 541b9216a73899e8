"""A served tiny model: uvicorn in a thread on a free port, and OpenAI's client."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from openai import OpenAI

from tests.trtllm_jax.tiny_engine import CACHE, tiny_engine
from trtllm_jax import LLM, SamplingParams
from trtllm_jax.llmapi import KvCacheConfig
from trtllm_jax.requests.outputs import Delta, RequestOutput
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings

TEMPLATE = """
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}{{ message.role }}: {{ message.content or '' }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}
"""


@contextmanager
def _served(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False, timeout_keep_alive=60))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def served() -> Callable[[Any], AbstractContextManager[str]]:
    """(application) -> a context with its address."""
    return _served


@pytest.fixture(scope="session")
def tiny_llm(tiny_llama: Path) -> Iterator[LLM]:
    cache = KvCacheConfig(**CACHE, event_buffer_max_size=1000)
    with tiny_engine(tiny_llama, chat_template=TEMPLATE, kv_cache_config=cache) as llm:
        yield llm


@pytest.fixture(scope="session")
def app(tiny_llm: LLM) -> Any:
    return create_app(tiny_llm, ServeSettings(model_names=("tiny", "tiny/alias")))


@pytest.fixture(scope="session")
def address(app: Any) -> Iterator[str]:
    with _served(app) as url:
        yield url


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


class Scripted:
    """An `LLM` that answers with a given text, in pieces of random lengths."""

    failure = None
    pause = 0.001
    """Seconds between two pieces."""

    def __init__(self, llm: LLM, text: str) -> None:
        self.facts, self.tokenizer, self.chat_template, self._text = llm.facts, llm.tokenizer, llm.chat_template, text
        self._llm = llm
        self.prompts: list[str] = []
        self.params: SamplingParams | None = None
        self.aborted = threading.Event()

    def chat_prompt(self, messages: Any, **how: Any) -> dict[str, Any]:
        return self._llm.chat_prompt(messages, **how)

    async def get_stats_async(self) -> list[Any]:
        return []

    def generate_async(self, prompt: Any, params: SamplingParams, *, streaming: bool) -> RequestOutput:
        self.prompts.append(prompt["prompt"])
        self.params = params
        output = RequestOutput(1, prompt["prompt"], prompt["prompt_token_ids"], 1, self.aborted.set)
        threading.Thread(target=self._say, args=(output,)).start()
        return output

    def _say(self, output: RequestOutput) -> None:
        rest, cut = self._text, random.Random(0)
        while rest and not self.aborted.is_set():
            length = cut.randint(1, 9)
            piece, rest = rest[:length], rest[length:]
            output._deliver(Delta(0, piece, (1,), finish_reason=None if rest else "stop"))
            time.sleep(self.pause)
        if rest:
            output._deliver(Delta(0, finish_reason="cancelled"))


@contextmanager
def _saying(llm: LLM, served: Any, text: str, **settings: Any) -> Iterator[tuple[OpenAI, Scripted]]:
    scripted = Scripted(llm, text)
    app = create_app(scripted, ServeSettings(model_names=("tiny",), **settings))  # type: ignore[arg-type]
    with served(app) as url, OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client, scripted


@pytest.fixture
def saying(tiny_llm: LLM, served: Any) -> Callable[..., Any]:
    """(text, **settings) -> a context with a client of a server whose model answers with the text, and the model."""
    return partial(_saying, tiny_llm, served)
