"""Statistics against values computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from trtllm_jax.commands.bench.report import batch_table, plot
from trtllm_jax.commands.bench.request_results import Distribution, RequestsResult, RequestTimes
from trtllm_jax.commands.bench.results import BatchResult, FirstTokenResult, StartUpResult


def test_a_distribution_of_one_to_a_hundred_and_one() -> None:
    """Rank p of the values 1 to 101 is p + 1 exactly."""
    values = np.random.default_rng(0).permutation(np.arange(1, 102)).tolist()
    expected = Distribution(avg=51.0, p50=51.0, p90=91.0, p95=96.0, p99=100.0, min=1.0, max=101.0)
    assert Distribution.of(values) == expected
    assert Distribution.of([]) is None


def test_batch_figures_follow_from_the_medians() -> None:
    result = BatchResult(4, 100, 11, first_seconds=(0.5, 9.0, 0.4), all_seconds=(2.5, 2.4, 99.0))
    record = result.record()
    assert record["first_token_ms"] == pytest.approx(500)
    assert record["total_ms"] == pytest.approx(2500)
    assert record["step_ms"] == pytest.approx(200)  # 2 s for 10 steps
    assert record["decode_tokens_per_s"] == pytest.approx(20)  # 4 rows x 10 tokens in 2 s
    assert record["output_tokens_per_s"] == pytest.approx(44 / 2.5)
    assert record["total_tokens_per_s"] == pytest.approx(444 / 2.5)
    assert record["prefill_tokens_per_s"] == pytest.approx(800)
    assert record["all_seconds"] == [2.5, 2.4, 99.0]


@pytest.mark.parametrize(
    ("first", "whole"),
    [
        ((0.2,), (0.1,)),
        ((0.5, 0.6, 0.7), (0.6, 0.7, 0.8)),  # 0.1 apart, and each repeat 0.1 off its median
        ((0.5, 0.5, 0.5), (0.3, 0.6, 1.0)),
    ],
)
def test_a_decode_rate_that_noise_hides_is_none(
    first: tuple[float, ...], whole: tuple[float, ...], tmp_path: Path
) -> None:
    result = BatchResult(1, 8, 2, first, whole)
    assert result.record()["step_ms"] is None
    assert result.record()["decode_tokens_per_s"] is None
    json.dumps(result.record(), allow_nan=False)
    assert "below the noise" in str(batch_table([result]).caption)
    plot(tmp_path / "empty.png", [result])


def test_a_difference_beyond_the_noise_is_a_step() -> None:
    result = BatchResult(1, 8, 2, first_seconds=(0.5, 0.6, 0.7), all_seconds=(0.8, 0.9, 1.0))
    assert result.step_s == pytest.approx(0.3)
    assert batch_table([result]).caption is None


def test_request_figures() -> None:
    first = RequestTimes(input_tokens=10, submitted=1.0, arrivals=(1.5, 1.5, 2.5, 3.0))
    second = RequestTimes(input_tokens=20, submitted=2.0, arrivals=(5.0,))
    result = RequestsResult((first, second), devices=2)
    assert (first.first_token_s, first.latency_s, first.gaps_s) == (0.5, 2.0, [0.0, 1.0, 0.5])
    assert first.per_token_s == pytest.approx(0.5)
    assert second.per_token_s is None

    rates = result.throughputs
    assert rates["Request Throughput (req/sec)"] == pytest.approx(2 / 4)
    assert rates["Total Output Throughput (tokens/sec)"] == pytest.approx(5 / 4)
    assert rates["Total Token Throughput (tokens/sec)"] == pytest.approx(35 / 4)
    assert rates["Per User Output Throughput (tps/user)"] == pytest.approx((4 / 2 + 1 / 3) / 2)
    assert rates["Per GPU Output Throughput (tps/gpu)"] == pytest.approx(5 / 8)
    assert rates["Total Latency (ms)"] == pytest.approx(4000)

    record = result.record()
    assert record["TTFT (ms)"]["avg"] == pytest.approx((500 + 3000) / 2)
    assert record["TPOT (ms)"]["max"] == pytest.approx(500)
    assert record["ITL (ms)"]["p50"] == pytest.approx(500)
    assert record["E2E Latency (ms)"]["min"] == pytest.approx(2000)
    json.dumps(record, allow_nan=False)


def test_answers_of_one_token_have_no_time_per_token() -> None:
    record = RequestsResult((RequestTimes(1, 0.0, (1.0,)),)).record()
    assert record["TPOT (ms)"] is None
    assert record["ITL (ms)"] is None


def test_other_records() -> None:
    assert FirstTokenResult(8, 4, (0.3, 0.1, 0.2)).record()["first_token_ms"] == pytest.approx(200)
    record = StartUpResult("cold", import_s=1, load_s=2, compile_s=4, first_token_s=8).record()
    assert (record["cache"], record["total_s"]) == ("cold", 15)
