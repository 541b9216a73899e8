"""`ServeResult`: the times of a server's answers under load, with failures and goodput."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trtllm_jax.commands.bench.answer import Answer
from trtllm_jax.commands.bench.request_results import RequestsResult, RequestTimes

OBJECTIVES = {"ttft": "first_token_s", "tpot": "per_token_s", "e2el": "latency_s"}
"""The latencies that goodput may bound, each with its property of `RequestTimes`."""

SATURATED = 0.9
"""The share of a core above which a client delays its own measurements."""


@dataclass(frozen=True)
class ServeResult(RequestsResult):
    """Requests that ran together; `requests` are those that succeeded, with one of `arrivals` for each read.

    Attributes:
        elapsed: seconds from the first submission to the last end, failures included.
        planned: the number of requests to send.
        failures: the number of failed requests, by kind.
        examples: a description of one failure of each kind.
        objectives: upper limits of a good answer in milliseconds, by the names in OBJECTIVES.
        uncounted: answers without the server's token counts: their output tokens are events, their prompts count as 0.
        busy: the busiest client process's share of a core.
    """

    elapsed: float = 0.0
    planned: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    objectives: Mapping[str, float] = field(default_factory=dict)
    uncounted: int = 0
    busy: float = 0.0

    @classmethod
    def of(
        cls,
        answers: Sequence[Answer],
        *,
        planned: int,
        concurrency: int | None = None,
        request_rate: float | None = None,
        objectives: Mapping[str, float] | None = None,
        busy: float = 0.0,
    ) -> "ServeResult":
        """The result of `answers`, in any order."""
        ordered = sorted(answers, key=lambda one: one.submitted)
        good = [one for one in ordered if not one.failure]
        failed = [one for one in ordered if one.failure]
        return cls(
            requests=tuple(
                RequestTimes(one.input_tokens or 0, one.submitted, one.arrivals, one.output_tokens) for one in good
            ),
            concurrency=concurrency,
            request_rate=request_rate,
            elapsed=max(one.ended for one in answers) - ordered[0].submitted if answers else 0.0,
            planned=planned,
            failures=dict(Counter(one.failure for one in failed).most_common()),
            examples={one.failure: one.detail for one in reversed(failed)},
            objectives=objectives or {},
            uncounted=sum(not one.counted or one.input_tokens is None for one in good),
            busy=busy,
        )

    @cached_property
    def seconds(self) -> float:
        """From the first submission to the last end, including failed requests."""
        return self.elapsed

    @property
    def failed(self) -> int:
        """Requests that failed."""
        return sum(self.failures.values())

    @property
    def unanswered(self) -> int:
        """Requests that an interruption left without an answer."""
        return self.planned - self.failed - len(self.requests)

    @property
    def good(self) -> int:
        """The number of answers that meet every objective; one without a time per token meets any limit on it."""
        return sum(self._meets(one) for one in self.requests)

    def _meets(self, one: RequestTimes) -> bool:
        seconds = {name: getattr(one, OBJECTIVES[name]) for name in self.objectives}
        return all(seconds[name] is None or seconds[name] * 1e3 <= most for name, most in self.objectives.items())

    @property
    def throughputs(self) -> dict[str, float]:
        """As for an engine, with goodput; without the rate per device, because a client does not know the devices."""
        if not self.requests:
            return {}
        rates = super().throughputs
        del rates["Per GPU Output Throughput (tps/gpu)"]
        if self.uncounted:
            del rates["Total Token Throughput (tokens/sec)"]
        return rates | ({"Goodput (req/sec)": self.good / self.seconds} if self.objectives else {})

    @property
    def notes(self) -> list[str]:
        """Remarks on failures, and on anything that makes the figures inexact."""
        notes = []
        if self.failed:
            notes.append(f"{self.failed} of {self.planned} requests failed:")
        for kind, count in self.failures.items():
            detail = self.examples[kind]
            notes.append(f"  {count} x {kind}" + (f", for example: {detail}" if detail else ""))
        if self.unanswered:
            notes.append(f"Interrupted: {self.unanswered} of {self.planned} requests had no answer yet.")
        if self.uncounted:
            notes.append(
                f"The server did not count the tokens of {self.uncounted} answers: events with text were counted."
            )
        if self.busy > SATURATED:
            notes.append(
                f"The client was busy for {self.busy:.0%} of the time, so the latencies include its own delays: raise "
                "--client_processes."
            )
        return notes

    def record(self) -> dict[str, Any]:
        """Figures, ready for JSON."""
        unknown = ("devices", "cached_prefix")
        return {name: value for name, value in super().record().items() if name not in unknown} | {
            "kind": "serve",
            "planned": self.planned,
            "failed": self.failed,
            "failures": dict(self.failures),
            "failure_examples": dict(self.examples),
            "unanswered": self.unanswered,
            "answers_counted_by_events": self.uncounted,
            "goodput_objectives_ms": dict(self.objectives),
            "good": self.good,
            "client_core_share": self.busy,
        }
