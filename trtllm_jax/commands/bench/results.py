"""The times of batches, first tokens and starts, as frozen records, and the figures derived from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class BatchResult:
    """One batch of prompts of equal length, measured several times; figures are derived from the medians.

    Attributes:
        batch: prompts that run together.
        input_len: tokens of each prompt.
        output_len: tokens generated for each.
        first_seconds: times of the whole call with one token a prompt.
        all_seconds: times of the whole call with `output_len` tokens a prompt.
    """

    batch: int
    input_len: int
    output_len: int
    first_seconds: tuple[float, ...]
    all_seconds: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        """Seconds until every prompt has its first token."""
        return median(self.first_seconds)

    @property
    def total_s(self) -> float:
        """Seconds until every prompt has all its tokens."""
        return median(self.all_seconds)

    @property
    def step_s(self) -> float | None:
        """Seconds of a decode step; None if the difference of the two timings is below their noise.

        The noise is the median absolute deviation of the repeats, which, like the median, ignores a single slow run.
        """
        seconds = self.total_s - self.first_token_s
        noise = _deviation(self.first_seconds) + _deviation(self.all_seconds)
        return seconds / (self.output_len - 1) if seconds > noise else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Generated tokens of all rows per second, without the first ones."""
        return self.batch / self.step_s if self.step_s else None

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens per second, with prefill included in the time."""
        return self.batch * self.output_len / self.total_s

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and generated tokens per second."""
        return self.batch * (self.input_len + self.output_len) / self.total_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second until the first generated token."""
        return self.batch * self.input_len / self.first_token_s

    def record(self) -> dict[str, Any]:
        """Figures and raw times, ready for JSON."""
        return {
            "kind": "batch",
            "batch_size": self.batch,
            "input_len": self.input_len,
            "output_len": self.output_len,
            "first_token_ms": self.first_token_s * 1e3,
            "total_ms": self.total_s * 1e3,
            "step_ms": self.step_s and self.step_s * 1e3,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "total_tokens_per_s": self.total_tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "first_seconds": list(self.first_seconds),
            "all_seconds": list(self.all_seconds),
        }


def _deviation(values: Sequence[float]) -> float:
    """The median absolute deviation."""
    middle = median(values)
    return median(abs(value - middle) for value in values)


@dataclass(frozen=True)
class FirstTokenResult:
    """Times to the first token of single prompts of `input_len` tokens, of which `cached` were in the prefix cache."""

    input_len: int
    cached: int
    seconds: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """Figures and raw times, ready for JSON."""
        return {
            "kind": "first_token",
            "input_len": self.input_len,
            "cached": self.cached,
            "first_token_ms": median(self.seconds) * 1e3,
            "seconds": list(self.seconds),
        }


@dataclass(frozen=True)
class StartUpResult:
    """One start of a fresh process, in seconds.

    Attributes:
        cache: "cold" for an empty compilation cache, "warm" for the one that the cold start filled.
        import_s: from the start of the process until `LLM` is imported.
        load_s: the time of `LLM(...)` without compiling: mostly reading the checkpoint.
        compile_s: the time to compile, as `LLM.compile_seconds` reports it.
        first_token_s: from the first request to its first token.
    """

    cache: str
    import_s: float
    load_s: float
    compile_s: float
    first_token_s: float

    @property
    def total_s(self) -> float:
        """From the start of the process to the first token."""
        return self.import_s + self.load_s + self.compile_s + self.first_token_s

    def record(self) -> dict[str, Any]:
        """Figures, ready for JSON."""
        return {"kind": "startup", **asdict(self), "total_s": self.total_s}
