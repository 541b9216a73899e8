"""Runs `trtllm-bench serve`: checks, a warm-up, a measurement for each rate and concurrency, and a report."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_jax.commands.bench.report import Result, reporting, require_plotting
from trtllm_jax.commands.bench.serve_results import ServeResult
from trtllm_jax.commands.bench.workload import Prompt, arrival_times, read_prompts, synthetic_requests
from trtllm_jax.commands.click_options import Bounds
from trtllm_jax.logger import progress

PATHS = {"completions": "/completions", "chat": "/chat/completions"}
DEFAULT_REQUESTS = 100
MODELS_TIMEOUT = 30.0

Prompts = list[tuple[Prompt, int]]
"""Prompts, each with the most tokens that its answer may have."""


@dataclass(frozen=True)
class Settings:
    """The options of `trtllm-bench serve` that all its measurements share, by name."""

    base_url: str
    model: str | None
    api_key: str | None
    endpoint: str
    timeout: float
    num_requests: int | None
    input_len: int
    output_len: int
    vocab_size: int
    tokenizer: str | None
    dataset: Path | None
    ignore_eos: bool
    extra_body: Mapping[str, Any]
    seed: int
    warmup: int
    objectives: Mapping[str, float]
    client_processes: int
    report_json: Path | None
    json_lines: bool
    plot: Path | None

    def prompts(self) -> Callable[[int, int | None], Prompts]:
        """A function from a measurement's number and a count, or None for all, to its prompts.

        Random prompts differ between measurements, so that none is in a server's prefix cache. ValueError if the
        dataset or the tokenizer cannot be read, or the endpoint does not accept token ids.
        """
        count = self.num_requests
        if self.dataset:
            read = read_prompts(self.dataset, limit=count)
            if self.endpoint == "chat" and not all(isinstance(prompt, str) for prompt, _ in read):
                raise ValueError(f"dataset = {self.dataset} has token ids, and chat needs texts: use completions")
            return lambda _, some: list(itertools.islice(itertools.cycle(read), len(read) if some is None else some))
        tokenizer = _tokenizer(self.tokenizer) if self.tokenizer else None
        if self.endpoint == "chat" and tokenizer is None:
            raise ValueError("chat needs texts: give --tokenizer, to decode random ids, or --dataset")
        vocab = len(tokenizer) if tokenizer else self.vocab_size

        def draw(number: int, some: int | None) -> Prompts:
            many = (count or DEFAULT_REQUESTS) if some is None else some
            drawn = synthetic_requests(many, self.input_len, self.output_len, vocab=vocab, seed=self.seed + number)
            ids = [one.prompt for one in drawn]
            prompts = [_text(tokenizer, one) for one in ids] if self.endpoint == "chat" else ids
            return [(prompt, self.output_len) for prompt in prompts]

        return draw

    def body(self, model: str, prompt: Prompt, tokens: int) -> str:
        """The body of a request as JSON."""
        prompt_field = (
            {"messages": [{"role": "user", "content": prompt}]} if self.endpoint == "chat" else {"prompt": prompt}
        )
        fields: dict[str, Any] = {"model": model, **prompt_field, "max_tokens": tokens, "stream": True}
        fields |= {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if self.ignore_eos else {})
        return json.dumps(
            {name: value for name, value in (fields | dict(self.extra_body)).items() if value is not None}
        )

    def record(self, model: str) -> dict[str, Any]:
        """The settings for the report file."""
        omitted = ("api_key", "report_json", "json_lines", "plot", "objectives")
        return {name: value for name, value in vars(self).items() if name not in omitted} | {"model": model}


def measure_server(settings: Settings, rates: Sequence[float | None], bounds: Bounds) -> None:
    """Measure every combination of rate and concurrency. ValueError after the report if any request failed."""
    _require_client()
    from trtllm_jax.commands.bench.answer import Answer
    from trtllm_jax.commands.bench.http import Server
    from trtllm_jax.commands.bench.load import Load, run_load

    if settings.plot:
        require_plotting()
    server = Server.of(settings.base_url, settings.api_key)
    prompts = settings.prompts()
    model = settings.model or _first_model(server, settings)
    points = list(itertools.product(rates, bounds))

    def load(sent: Prompts, arrivals: Sequence[float], bound: int | None) -> Load:
        bodies = [settings.body(model, prompt, tokens) for prompt, tokens in sent]
        return Load(server, PATHS[settings.endpoint], bodies, arrivals, bound, settings.timeout)

    if settings.warmup:
        # A number that no measurement has, so that the warm-up's prompts are not measured.
        sent = prompts(len(points), settings.warmup)
        answers: list[Answer] = []
        run_load(load(sent, arrival_times(len(sent), None), max(filter(None, bounds), default=None)), answers.append)
        for failed in (one for one in answers if one.failure):
            reason = f"{failed.failure}: {failed.detail}" if failed.detail else failed.failure
            raise ValueError(f"{settings.base_url} failed a warm-up request: {reason}")

    failures = planned = 0
    about = {"server": settings.record(model)}
    with reporting(about, settings.json_lines, settings.report_json, settings.plot) as report:
        for number, (rate, bound) in enumerate(points):
            sent = prompts(number, None)
            planned += len(sent)
            arrivals = arrival_times(len(sent), rate, seed=settings.seed)
            result = _measure(settings, load(sent, arrivals, bound), rate, report)
            failures += result.failed
    if failures:
        raise ValueError(f"{failures} of {planned} requests failed")


def _measure(settings: Settings, load: Any, rate: float | None, report: Callable[[Result], None]) -> ServeResult:
    """The result of one measurement, which is reported even if it is interrupted."""
    from trtllm_jax.commands.bench.load import run_load

    answers: list[Any] = []
    busy = 0.0
    planned = len(load.bodies)
    try:
        with progress(planned, "Measuring") as bar:

            def take(answer: Any) -> None:
                answers.append(answer)
                bar.update()

            busy = run_load(load, take, settings.client_processes)
    finally:
        result = ServeResult.of(
            answers,
            planned=planned,
            concurrency=load.concurrency,
            request_rate=rate,
            objectives=settings.objectives,
            busy=busy,
        )
        report(result)
    return result


def _require_client() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("httptools", "uvloop") if find_spec(name) is None]:
        raise ValueError(f"serve needs {' and '.join(missing)}: install trtllm-jax[bench]")


def _first_model(server: Any, settings: Settings) -> str:
    from trtllm_jax.commands.bench.answer import RequestFailure
    from trtllm_jax.commands.bench.load import list_models, run_in_uvloop

    try:
        names: list[str] = run_in_uvloop(list_models(server, min(MODELS_TIMEOUT, settings.timeout)))
    except RequestFailure as failure:
        raise ValueError(
            f"{settings.base_url}/models does not list the models ({failure}): check --base_url, "
            "or name one with --model"
        ) from failure
    if not names:
        raise ValueError(f"{settings.base_url}/models lists no model: name one with --model")
    return names[0]


def _tokenizer(location: str) -> Any:
    from checkpoints.checkpoint import open_checkpoint

    return open_checkpoint(location, weights=False).load_tokenizer()


def _text(tokenizer: Any, ids: list[int]) -> str:
    """A text of about as many tokens as `ids`; encoding the text of random ids seldom gives the same ids."""
    again = tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=True), add_special_tokens=False)
    text: str = tokenizer.decode(again[: len(ids)])
    return text
