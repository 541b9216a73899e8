"""The command: its options, what it refuses before an engine starts, and what it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import trtllm_jax
from tests.trtllm_jax.tiny_engine import tiny_engine
from trtllm_jax import LLM
from trtllm_jax.commands.eval import run as eval_run
from trtllm_jax.commands.eval.command import main


def run(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False, prog_name="trtllm-eval")


def refused(*words: Any) -> str:
    result = run(*words)
    assert result.exit_code in (1, 2), result.output
    return " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TRTLLM_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama, max_seq_len=256) as llm:
        yield llm


@pytest.fixture
def asked(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One engine for every command; what the commands asked for is kept."""
    arguments: list[dict[str, Any]] = []

    def open_again(**asked_for: Any) -> Any:
        arguments.append(asked_for)
        return nullcontext(llm)

    monkeypatch.setattr(trtllm_jax, "LLM", open_again)
    return arguments


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(trtllm_jax, "LLM", fail)


def test_the_help_needs_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from trtllm_jax.commands.eval.command import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print({'jax', 'lm_eval', 'transformers', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--dataset_path" in found
    assert found.endswith("set()\n")


def test_logs_hold_no_progress_bars(eval_files: Path) -> None:
    code = (
        "import sys\n"
        "from trtllm_jax.commands.eval import run as eval_run\n"
        "def prepare(options, *_):\n"
        "    for task in eval_run.load_tasks(options)['tasks'].values():\n"
        "        task.build_all_requests(rank=0, world_size=1)\n"
        "        print(len(task.instances), 'requests')\n"
        "eval_run.run = prepare\n"
        "from trtllm_jax.commands.eval.command import main\n"
        "main(sys.argv[1:])"
    )
    words = ["--model", "model", "--dataset_path", str(eval_files), "piqa"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout == "6 requests\n"
    assert "it/s" not in done.stderr


def test_the_manuals_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(eval_run, "run", lambda *call: calls.append(call))
    assert run("--model", "model", "--backend", "tensorrt", "--tp_size", 2).exit_code == 0
    ((options, arguments),) = calls
    assert options == eval_run.EvalOptions()
    assert arguments == {"model": "model", "backend": "tensorrt", "tensor_parallel_size": 2}


def test_options_outweigh_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(eval_run, "run", lambda *call: calls.append(call))
    config = tmp_path / "config.yaml"
    config.write_text(
        "limit: 9\nnum_fewshot: 2\nmax_batch_size: 3\nmax_seq_len: 77\nmodel: other\n"
        "kv_cache_config: {max_tokens: 99, enable_block_reuse: true}\n"
    )
    run(
        "-m", "model", "--extra_llm_api_options", config, "--max-batch-size", 5, "--disable_kv_cache_reuse",
        "--num_samples", 4, "--tasks", "gsm8k, mmlu", "--random_seed", 9,
    )  # fmt: skip
    ((options, arguments),) = calls
    assert options == eval_run.EvalOptions(tasks=("gsm8k", "mmlu"), limit=4, num_fewshot=2, random_seed=9)
    assert arguments == {
        "model": "model",
        "max_batch_size": 5,
        "max_seq_len": 77,
        "kv_cache_config": {"max_tokens": 99, "enable_block_reuse": False},
    }


def test_a_table_and_a_file(tiny_llama: Path, eval_files: Path, asked: list[Any], tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    result = run(
        "--model", tiny_llama, "--dataset_path", eval_files, "mmlu", "wikitext", "gsm8k", "lambada_openai",
        "--limit", 2, "--max_seq_len", 128, "--num_fewshot", 0, "--max_output_length", 4, "--output_path", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (arguments,) = asked
    assert arguments == {"model": str(tiny_llama), "max_seq_len": 128}
    found = json.loads(output.read_text())
    assert set(found["results"]) == {"mmlu", "mmlu_anatomy", "mmlu_virology", "wikitext", "gsm8k", "lambada_openai"}
    assert found["results"]["lambada_openai"]["perplexity_stderr,none"] >= 0
    assert "bootstrapping" not in result.stdout
    assert found["n-samples"]["mmlu_anatomy"] == {"original": 3, "effective": 2}
    assert found["results"]["wikitext"]["word_perplexity,none"] > 1
    config = found["config"]
    assert (config["max_length"], config["dtype"], config["limit"]) == (128, "float32", 2)
    assert config["engine"].startswith("trtllm_jax ")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.stdout.splitlines() if "│" in line]
    by_task = {(row[0].lstrip("- "), row[4]): row for row in rows}
    group = by_task["mmlu", "acc ↑"]
    assert (group[1], float(group[5])) == ("4", pytest.approx(found["results"]["mmlu"]["acc,none"], abs=1e-4))
    assert by_task["gsm8k", "exact_match ↑"][1:3] == ["2", "0"]
    assert ("wikitext", "word_perplexity ↓") in by_task


def test_without_tasks_all_whose_files_are_there(
    tiny_llama: Path, eval_files: Path, asked: list[Any], tmp_path: Path
) -> None:
    for name in ("arc_easy.jsonl", "piqa.jsonl"):
        (tmp_path / name).write_bytes((eval_files / name).read_bytes())
    result = run("--model", tiny_llama, "--dataset_path", tmp_path, "--limit", 1)
    assert {"arc_easy", "piqa"} == set(
        eval_run.load_tasks(eval_run.EvalOptions(tasks=(), dataset_path=tmp_path))["tasks"]
    )
    assert "arc_easy" in result.stdout
    assert "piqa" in result.stdout


@pytest.mark.usefixtures("no_engine")
class TestRefusals:
    def test_no_model(self) -> None:
        assert "Missing option '--model'" in refused("mmlu")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--limit", "0"], "0 is not in the range x>=1"),
            (["--tasks", "mmlu,,gsm8k"], "trtllm-eval.tasks"),
            (["--tasks", "mmlu", "gsm8k"], "TASKS and --tasks are the same"),
            (["--dataset_path", "nowhere"], "Directory 'nowhere' does not exist"),
            (["--backend", "onnx"], "'onnx' is not one of 'jax', 'pytorch', 'tensorrt'"),
            (["--output_path", "no/folder.json"], "is not in an existing folder"),
        ],
    )
    def test_wrong_options(self, words: list[str], message: str) -> None:
        assert message in refused("--model", "model", *words)

    def test_unknown_tasks_and_missing_files(self, tiny_llama: Path, eval_files: Path, tmp_path: Path) -> None:
        there = ("--model", tiny_llama, "--dataset_path")
        assert "task 'helaswag' is unknown with --dataset_path: use arc_easy" in refused(*there, eval_files, "helaswag")
        assert "piqa.jsonl is missing" in refused(*there, tmp_path, "piqa")
        assert "has none of the tasks' files: arc_easy.jsonl" in refused(*there, tmp_path)

    def test_unknown_models(self, eval_files: Path, tmp_path: Path) -> None:
        assert str(tmp_path) in refused("--model", tmp_path, "--dataset_path", eval_files, "piqa")

    def test_lm_eval_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eval_run.importlib.util, "find_spec", lambda _: None)
        assert "install trtllm-jax[eval]" in refused("--model", "model")


def test_a_model_without_a_chat_template(tiny_llama: Path, eval_files: Path, asked: list[Any]) -> None:
    words = ("--model", tiny_llama, "--dataset_path", eval_files, "piqa", "--apply_chat_template")
    assert "has no chat template: leave --apply_chat_template out" in refused(*words)


def test_data_that_only_the_hub_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    definitions = Path(lm_eval.tasks.__file__).parent
    some = lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[definitions / "mmlu" / "default", definitions / "hellaswag"]
    )

    def offline(names: list[str]) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(some, "load", offline)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda: some)
    with pytest.raises(ValueError, match=r"data of mmlu is not cached.*\(no route\): give a folder"):
        eval_run.load_tasks(eval_run.EvalOptions())
    with pytest.raises(ValueError, match=r"task 'hella' is unknown to lm-eval.*hellaswag"):
        eval_run.load_tasks(eval_run.EvalOptions(tasks=("hella",)))
