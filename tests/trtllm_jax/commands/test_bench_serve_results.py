"""Figures of answers with chosen times, against numpy and brute force."""

import json
from pathlib import Path

import numpy as np
import pytest

from trtllm_jax.commands.bench.answer import Answer
from trtllm_jax.commands.bench.report import plot
from trtllm_jax.commands.bench.serve_results import ServeResult


def random_answers(count: int, seed: int = 0) -> list[Answer]:
    rng = np.random.default_rng(seed)
    answers = []
    for _ in range(count):
        submitted = float(rng.uniform(0, 10))
        arrivals = submitted + np.cumsum(rng.exponential(0.1, rng.integers(1, 20)))
        tokens = len(arrivals) + int(rng.integers(0, 5))
        answers.append(Answer(submitted, arrivals[-1] + 0.01, tuple(arrivals.tolist()), 8, tokens, True))
    return answers


def test_figures_against_numpy() -> None:
    answers = random_answers(200)
    result = ServeResult.of(answers, planned=200)
    seconds = max(one.ended for one in answers) - min(one.submitted for one in answers)
    tokens = sum(one.output_tokens for one in answers)
    assert result.throughputs["Request Throughput (req/sec)"] == pytest.approx(200 / seconds)
    assert result.throughputs["Total Output Throughput (tokens/sec)"] == pytest.approx(tokens / seconds)
    assert result.throughputs["Total Token Throughput (tokens/sec)"] == pytest.approx((tokens + 1600) / seconds)
    assert "Per GPU Output Throughput (tps/gpu)" not in result.throughputs

    several = [one for one in answers if len(one.arrivals) > 1]
    expected = {
        "TTFT": [one.arrivals[0] - one.submitted for one in answers],
        "TPOT": [(one.arrivals[-1] - one.arrivals[0]) / (one.output_tokens - 1) for one in several],
        "ITL": np.concatenate([np.diff(one.arrivals) for one in answers]),
        "E2E Latency": [one.arrivals[-1] - one.submitted for one in answers],
    }
    for name, values in expected.items():
        found = result.latencies[name]
        assert found is not None
        milliseconds = np.asarray(values) * 1e3
        for percent in (50, 90, 95, 99):
            assert getattr(found, f"p{percent}") == pytest.approx(np.percentile(milliseconds, percent))
        assert (found.avg, found.min, found.max) == pytest.approx(
            (milliseconds.mean(), milliseconds.min(), milliseconds.max())
        )


def test_goodput_against_brute_force() -> None:
    answers = random_answers(300, seed=1)
    everything = max(one.ended for one in answers) - min(one.submitted for one in answers)
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(20):
        ttft, tpot, e2el = rng.uniform((50, 40, 200), (400, 120, 2000)).tolist()
        good = 0
        for one in answers:
            fast = (one.arrivals[0] - one.submitted) * 1e3 <= ttft and (one.arrivals[-1] - one.submitted) * 1e3 <= e2el
            if len(one.arrivals) > 1:
                fast = fast and (one.arrivals[-1] - one.arrivals[0]) * 1e3 / (one.output_tokens - 1) <= tpot
            good += fast
        result = ServeResult.of(answers, planned=300, objectives={"ttft": ttft, "tpot": tpot, "e2el": e2el})
        assert result.good == good
        assert result.throughputs["Goodput (req/sec)"] == pytest.approx(good / everything)
        seen.add(good)
    assert len(seen) > 10
    assert "Goodput (req/sec)" not in ServeResult.of(answers, planned=300).throughputs


def test_a_merged_chunk_is_one_gap_and_not_zeros() -> None:
    """Five tokens in two reads a second apart."""
    result = ServeResult.of([Answer(0.0, 3.0, (1.0, 2.0), 4, 5, True)], planned=1)
    (one,) = result.requests
    assert one.gaps_s == [1.0]
    assert one.per_token_s == pytest.approx(1 / 4)
    assert result.output_tokens == 5
    all_at_once = ServeResult.of([Answer(0.0, 3.0, (1.0,), 4, 5, True)], planned=1, objectives={"tpot": 1.0})
    assert (all_at_once.latencies["TPOT"], all_at_once.latencies["ITL"], all_at_once.good) == (None, None, 1)


def test_failures_are_counted_by_kind_and_take_time() -> None:
    answers = [
        Answer(1.0, 2.0, (1.5, 2.0), 3, 2, True),
        Answer(1.5, 1.6, failure="HTTP 429", detail="later"),
        Answer(0.0, 10.0, failure="timeout", detail="no complete answer within 10 s"),
        Answer(1.0, 1.1, failure="HTTP 429", detail="slow down"),
    ]
    result = ServeResult.of(answers, planned=6)
    assert result.throughputs["Request Throughput (req/sec)"] == pytest.approx(1 / 10)
    assert result.failures == {"HTTP 429": 2, "timeout": 1}
    assert (result.failed, result.unanswered) == (3, 2)
    assert result.notes == [
        "3 of 6 requests failed:",
        "  2 x HTTP 429, for example: slow down",
        "  1 x timeout, for example: no complete answer within 10 s",
        "Interrupted: 2 of 6 requests had no answer yet.",
    ]
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert (record["kind"], record["failed"], record["failures"]["timeout"]) == ("serve", 3, 1)
    assert record["failure_examples"]["HTTP 429"] == "slow down"


def test_nothing_answered(tmp_path: Path) -> None:
    for answers in ([], [Answer(0.0, 1.0, failure="timeout")]):
        result = ServeResult.of(answers, planned=1)
        json.dumps(result.record(), allow_nan=False)
        assert result.throughputs == {}
        plot(tmp_path / "empty.png", [result])


def test_what_the_server_did_not_count_is_said() -> None:
    result = ServeResult.of([Answer(0.0, 1.0, (1.0,), None, 3, False)], planned=1, busy=0.97)
    assert "Total Token Throughput (tokens/sec)" not in result.throughputs
    uncounted, busy = result.notes
    assert "did not count the tokens of 1 answers" in uncounted
    assert "busy for 97% of the time" in busy
