"""Prepared datasets, read back by what reads them for measurements."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from trtllm_jax.commands.bench.command import main
from trtllm_jax.commands.bench.prompts import normal, uniform
from trtllm_jax.commands.bench.workload import read_dataset, read_prompts

VOCAB = 258


def run(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def refused(*words: Any) -> str:
    result = run(*words)
    assert result.exit_code in (1, 2), result.output
    return " ".join(result.stderr.split())


def no_texts(text: str) -> list[int]:
    raise AssertionError(text)


def test_normal_lengths(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "norm.json"
    sizes = ("--num-requests", "200", "--input-mean", "40", "--input-stdev", "8", "--output-mean", "9")
    words = ("prepare-dataset", "--output", output, "--random-seed", "7", "token-norm-dist", *sizes)
    result = run("--model", tiny_llama, *words, "--output-stdev", "0")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 200 requests\n"
    requests = read_dataset(output, vocab=VOCAB, encode=no_texts)
    lengths = [len(one.prompt) for one in requests]
    assert np.mean(lengths) == pytest.approx(40, abs=3 * 8 / 200**0.5)
    assert np.std(lengths) == pytest.approx(8, rel=0.2)
    assert {one.output_tokens for one in requests} == {9}
    assert [json.loads(line)["task_id"] for line in output.read_text().splitlines()] == list(range(200))

    first = output.read_text()
    run("--model", tiny_llama, *words, "--output-stdev", "0")
    assert output.read_text() == first


def test_uniform_lengths_of_a_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "unif.json"
    sizes = ("--num_requests", "300", "--input_min", "3", "--input_max", "6", "--output_min", "1", "--output_max", "2")
    result = run("prepare-dataset", "--tokenizer", tiny_llama, "--output", output, "token-unif-dist", *sizes)
    assert result.exit_code == 0, result.output
    requests = read_dataset(output, vocab=VOCAB, encode=no_texts)
    assert {len(one.prompt) for one in requests} == {3, 4, 5, 6}
    assert {one.output_tokens for one in requests} == {1, 2}


def test_lengths_are_drawn_from_their_distribution() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(uniform(1, 4)(rng, 40_000))
    assert set(counts) == {1, 2, 3, 4}
    assert all(count == pytest.approx(10_000, rel=0.05) for count in counts.values())
    draws = normal(100, 10)(rng, 40_000)
    assert np.mean(draws) == pytest.approx(100, abs=0.3)
    assert np.std(draws) == pytest.approx(10, rel=0.03)
    assert min(normal(1, 50)(rng, 1000)) == 1


SAID = (("system", "s"), ("user", "hé"), ("assistant", "x"))
ENTRIES: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "four"}]},
    {"conversations": [{"from": "gpt", "value": "first"}, {"from": "human", "value": "nobody answers"}]},
    {"messages": [*({"role": who, "content": what} for who, what in SAID)]},
    {"conversations": []},
    {"prompt": "plain", "answer": "abc", "style": "Kindly:"},
]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_conversations(tiny_llama: Path, tmp_path: Path, form: str) -> None:
    source, output = tmp_path / "source.json", tmp_path / "out.json"
    lines = "\n".join(json.dumps(one) for one in ENTRIES)
    source.write_text(json.dumps(ENTRIES) if form == "list" else lines)
    words = ("--model", tiny_llama, "prepare-dataset", "--output", output, "real-dataset", "--dataset-name", source)

    assert run(*words).exit_code == 0
    assert read_prompts(output) == [("hello", 4), ("hé", 1)]

    assert run(*words, "--dataset-output-key", "answer", "--dataset-prompt-key", "style").exit_code == 0
    assert read_prompts(output) == [("Kindly: plain", 3)]

    assert run(*words, "--output-len-dist", "6,0", "--dataset-prompt", "Say", "--num-requests", "3").exit_code == 0
    assert read_prompts(output) == [("Say hello", 6), ("Say nobody answers", 6), ("Say hé", 6)]

    # "é" has two bytes, and every byte is a token.
    assert run(*words, "--output-len-dist", "6,0", "--max-input-len", "4").exit_code == 0
    assert read_prompts(output) == [("hé", 6)]
    (request,) = read_dataset(output, vocab=VOCAB, encode=lambda text: list(text.encode()))
    assert (len(request.prompt), request.output_tokens) == (3, 6)

    assert "none of its 5 entries has a prompt of at most 1 tokens and an answer" in refused(
        *words, "--max_input_len", 1
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}\n{', "line 2: not JSON"),
        ("[1]", "entry 1: '1' is not an object"),
        ("", "none of its 0 entries has a prompt and an answer; name its fields by --dataset_input_key"),
    ],
)
def test_files_that_are_no_dataset(tiny_llama: Path, tmp_path: Path, text: str, said: str) -> None:
    source = tmp_path / "source.json"
    source.write_text(text)
    output = tmp_path / "out.json"
    words = ("--model", tiny_llama, "prepare-dataset", "--output", output, "real-dataset", "--dataset_name", source)
    assert said in refused(*words)
    assert not output.exists()


def test_refusals(tiny_llama: Path, tmp_path: Path) -> None:
    def unif(*before: Any, least: int = 1, most: int = 2) -> str:
        sizes = ("--num_requests", "1", "--input_min", least, "--input_max", most, "--output_min", "1")
        return refused(
            "prepare-dataset", "--output", tmp_path / "x", *before, "token-unif-dist", *sizes, "--output_max", 2
        )

    model = ("--model", tiny_llama)
    assert "Missing option '--model' / '-m' or '--tokenizer'" in unif()
    assert "--input_min = 3 is above --input_max = 2" in unif(*model, least=3)
    assert "the model's longest sequence has 256" in unif(*model, least=255, most=300)
    assert "--task_id = 3 is not available in this release" in unif(*model, "--task-id", "3")
    assert "--lora_dir = x is not available" in unif(*model, "--lora-dir", "x")
    assert "--rand_task_id = (1, 2) is not available" in unif(*model, "--rand-task-id", "1", "2")
    assert "is not in an existing folder" in unif(*model, "--output", tmp_path / "no" / "x")
    assert not (tmp_path / "x").exists()
    words = ("prepare-dataset", *model, "real-dataset", "--dataset_name", tiny_llama / "config.json")
    assert "'12' is not a mean and a standard deviation" in refused(*words, "--output-len-dist", "12")
    assert "exclude each other" in refused(*words, "--dataset_prompt", "a", "--dataset_prompt_key", "b")
