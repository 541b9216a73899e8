"""`trtllm-bench serve`: its options, what it sends, what it reports, and how it fails."""

import asyncio
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import trtllm_jax
from trtllm_jax.commands.bench.command import main
from trtllm_jax.commands.bench.workload import arrival_times

from .scripted_server import ScriptedServer, answer_well, http

SMALL = ("--input_len", "5", "--output_len", "3")


def run(*words: Any, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, [str(word) for word in words], catch_exceptions=False)


def records(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(*words: Any) -> str:
    result = run("serve", *words)
    assert result.exit_code in (1, 2), result.output
    return " ".join(result.stderr.split())


def test_a_sweep_is_reported(server: ScriptedServer, tmp_path: Path) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    words = ("--concurrency", "1,2", "--request_rate", "500,inf", "--num_requests", "4", "--warmup", "3")
    where = ("--report_json", report, "--plot", plot, "--api_key", "secret")
    goodput = ("--goodput", "ttft:60000", "tpot:60000", "e2el:0.000001")
    result = run("serve", "--base_url", server.base_url, *SMALL, *words, *where, *goodput)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Latency, ms") == 4
    assert "4 requests, 20 prompt tokens, 12 output tokens, concurrency 2, 500 requests/s" in result.stdout

    written = json.loads(report.read_text())
    assert (written["server"]["model"], written["server"]["base_url"]) == ("first", server.base_url)
    assert "secret" not in report.read_text()
    points = [(one["request_rate"], one["concurrency"]) for one in written["results"]]
    assert points == [(500.0, 1), (500.0, 2), (None, 1), (None, 2)]
    for one in written["results"]:
        assert (one["num_requests"], one["failed"], one["input_tokens"], one["output_tokens"]) == (4, 0, 20, 12)
        assert (one["good"], one["Goodput (req/sec)"]) == (0, 0)
        assert one["TTFT (ms)"]["p50"] <= one["E2E Latency (ms)"]["p50"]
    assert plot.read_bytes().startswith(b"\x89PNG")

    assert len(server.bodies) == 3 + 4 * 4
    assert all("\r\nAuthorization: Bearer secret\r\n" in head for head in server.heads)
    # No prompt is sent twice, so that a prefix cache finds none.
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 19


def test_what_is_sent(server: ScriptedServer) -> None:
    words = ("--num_requests", "1", "--warmup", "0", "--json_lines", "--model", "named", "--ignore_eos")
    extra = ("--extra_body", '{"temperature": 0, "stream_options": null}', "--vocab_size", "7")
    (record,) = records(run("serve", "--base_url", server.base_url, *SMALL, *words, *extra, OPENAI_API_KEY="of-env"))
    (body,) = server.bodies
    prompt = body.pop("prompt")
    assert len(prompt) == 5
    assert all(0 <= token < 7 for token in prompt)
    assert body == {"model": "named", "max_tokens": 3, "stream": True, "ignore_eos": True, "temperature": 0}
    assert "\r\nAuthorization: Bearer of-env\r\n" in server.heads[0]
    assert (record["output_tokens"], record["answers_counted_by_events"]) == (3, 1)


def test_the_group_takes_shared_options(server: ScriptedServer) -> None:
    words = ("--num_requests", "1", "--base_url", server.base_url, *SMALL)
    (record,) = records(run("--model", "outer", "--json_lines", "--warmup", "2", "serve", *words))
    assert [body["model"] for body in server.bodies] == ["outer"] * 3
    assert record["planned"] == 1


def test_chat_with_texts_of_a_tokenizer(server: ScriptedServer, tiny_llama: Path) -> None:
    words = ("--endpoint", "chat", "--tokenizer", tiny_llama, "--num_requests", "2", "--json_lines")
    (record,) = records(run("serve", "--base_url", server.base_url, *SMALL, *words))
    assert record["output_tokens"] == 6
    for body in server.bodies:
        (message,) = body["messages"]
        assert message["role"] == "user"
        assert message["content"]
    assert all(head.startswith("POST /v1/chat/completions ") for head in server.heads)


def test_a_dataset_is_sent_as_it_is(server: ScriptedServer, tmp_path: Path) -> None:
    dataset = tmp_path / "data.jsonl"
    lines = [{"prompt": "ab\u2028c", "output_tokens": 2}, {"input_ids": [5, 99999], "output_tokens": 1}]
    dataset.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    words = ("serve", "--base_url", server.base_url, "--dataset", dataset, "--concurrency", "1", "--warmup", "0")
    (record,) = records(run(*words, "--json_lines"))
    assert [(body["prompt"], body["max_tokens"]) for body in server.bodies] == [("ab\u2028c", 2), ([5, 99999], 1)]
    assert (record["num_requests"], record["output_tokens"]) == (2, 3)
    assert "chat needs texts: use completions" in refused("--dataset", dataset, "--endpoint", "chat")


def test_failed_requests_fail_the_command(server: ScriptedServer) -> None:
    numbers = itertools.count()

    async def sometimes(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if next(numbers) % 2:
            writer.write(http("429 Too Many Requests", b'{"error": {"message": "queue full"}}'))
        else:
            await answer_well(body, writer)

    server.behaviour = sometimes
    words = ("--num_requests", "4", "--concurrency", "1", "--warmup", "0")
    result = run("serve", "--base_url", server.base_url, *SMALL, *words)
    assert result.exit_code == 1
    assert "Error: 2 of 4 requests failed" in result.stderr
    assert "2 of 4 requests failed:\n  2 x HTTP 429, for example: queue full\n" in result.stdout
    assert "\n2 requests, 10 prompt tokens, 6 output tokens" in result.stdout


def test_a_failed_warm_up_ends_the_command_at_once(server: ScriptedServer) -> None:
    async def broken(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(http("500 Oops", b'{"error": "no such model"}'))

    server.behaviour = broken
    said = refused("--base_url", server.base_url, *SMALL)
    assert f"{server.base_url} failed a warm-up request: HTTP 500: no such model" in said
    assert len(server.bodies) == 1


def test_a_server_that_lists_no_models(server: ScriptedServer) -> None:
    said = refused("--base_url", f"http://localhost:{server.port}/v7", *SMALL)
    assert "/v7/models does not list the models (connection lost" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--base_url", "localhost"), "base_url = 'localhost' is not the URL of a server: write for example http://"),
        (("--request_rate", "0"), "'0' is not a list of positive numbers: write for example 2,4,inf"),
        (("--request_rate", "nan"), "'nan' is not a list of positive numbers"),
        (("--concurrency", "x"), "'x' is not a list of positive integers"),
        (("--goodput", "ttft"), "--goodput got 'ttft': write ttft, tpot, e2el with milliseconds"),
        (("--goodput", "itl:5"), "--goodput got 'itl:5'"),
        (("--goodput", "ttft:5", "tpot:-1"), "--goodput got 'tpot:-1'"),
        (("ttft:5",), "unexpected extra argument (ttft:5)"),
        (("--extra_body", "["), "'[' is not JSON"),
        (("--extra_body", "[]"), "'[]' is not an object"),
        (("--extra_body", '{"stream": false}'), "answers are measured as streams: leave stream out"),
        (("--endpoint", "chat"), "chat needs texts: give --tokenizer, to decode random ids, or --dataset"),
        (("--api_key", "a\nb"), "api_key has a space or a character that HTTP does not allow"),
    ],
)
def test_refusals(words: tuple[str, ...], said: str) -> None:
    assert said in refused(*words)


def test_options_of_an_engine_are_refused() -> None:
    result = run("--tp", "2", "serve")
    assert (result.exit_code, "--tp has no effect on 'serve': leave it out" in result.stderr) == (2, True)
    assert "--batch_size is for fixed batches" in run("--batch_size", "2", "serve").stderr


def documented() -> list[list[str]]:
    text = Path(trtllm_jax.__file__).parents[1].joinpath("docs", "benchmarking.md").read_text()
    lines = text.split("## Servers\n")[1].split("\n## Reports\n")[0].splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("trtllm-bench ")]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
@pytest.mark.slow
def test_documented_commands_run(
    words: list[str], server: ScriptedServer, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, but for the model, the server and how much is sent."""
    monkeypatch.chdir(tmp_path)
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]
    Path("conversations.json").write_text(json.dumps([{"conversations": talk}]))
    Path("preprocessed_dataset.json").write_text('{"task_id": 0, "prompt": "hello", "output_tokens": 3}\n')
    # Its vocabulary is wanted, and not its context of 256 tokens.
    config = json.loads((tiny_llama / "config.json").read_text()) | {"max_position_embeddings": 4096}
    shutil.copytree(tiny_llama, "M")
    Path("M", "config.json").write_text(json.dumps(config))
    less = ["--base_url", server.base_url, "--num_requests", "2", "--input_len", "3", "--output_len", "2"]
    result = run(*words, *(less if "serve" in words else []))
    assert result.exit_code == 0, result.output


def test_arrivals_are_a_poisson_process() -> None:
    """Counts in equal windows have the variance of their mean, and the same seed gives the same times."""
    times = arrival_times(40_000, 100.0, seed=1)
    counts = [0] * 400
    for at in times:
        if at < 400:
            counts[int(at)] += 1
    filled = counts[:390]
    mean = sum(filled) / len(filled)
    variance = sum((count - mean) ** 2 for count in filled) / len(filled)
    assert mean == pytest.approx(100, rel=0.03)
    assert variance == pytest.approx(mean, rel=0.25)
    assert times == arrival_times(40_000, 100.0, seed=1)


def test_a_process_without_jax_that_is_interrupted_reports_what_it_has(server: ScriptedServer, tmp_path: Path) -> None:
    numbers, stuck = itertools.count(), threading.Event()

    async def two_answers(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if next(numbers) < 2:
            await answer_well(body, writer)
        else:
            stuck.set()
            await asyncio.sleep(60)

    server.behaviour = two_answers
    report = tmp_path / "report.json"
    words = ("serve", "--base_url", server.base_url, *SMALL, "--num_requests", "5", "--concurrency", "1")
    code = (
        "import sys\n"
        "from trtllm_jax.commands.bench.command import main\n"
        "try:\n    main()\n"
        "finally:\n    heavy = {'jax', 'transformers', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *words, "--warmup", "0", "--report_json", str(report)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert stuck.wait(60)
            os.kill(child.pid, signal.SIGINT)
            stdout, stderr = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 1, stderr
    assert "Aborted!" in stderr
    assert stderr.splitlines()[-1] == "[]"
    assert "Interrupted: 3 of 5 requests had no answer yet." in stdout
    (record,) = json.loads(report.read_text())["results"]
    assert (record["num_requests"], record["unanswered"]) == (2, 3)
