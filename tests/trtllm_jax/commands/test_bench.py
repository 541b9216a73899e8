"""The command: its options, what it refuses before anything starts, and every form on a tiny model."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import trtllm_jax
from trtllm_jax import LLM
from trtllm_jax.commands.bench import run as bench_run
from trtllm_jax.commands.bench.command import main
from trtllm_jax.commands.bench.options import Common, common_options

SIZES = {"dtype": "float32", "max_num_tokens": 16, "max_batch_size": 2, "max_seq_len": 256}


def run(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False, prog_name="trtllm-bench")


def refused(*words: Any) -> str:
    result = run(*words)
    assert result.exit_code in (1, 2), result.output
    return " ".join(result.stderr.split())


def records(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="session")
def shape(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a config.json, of the tiny model with one layer."""
    folder = tmp_path_factory.mktemp("shape")
    config = json.loads((tiny_llama / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def real_llm(shape: Path) -> Iterator[LLM]:
    cache = {"max_tokens": 1024, "enable_block_reuse": True}
    with LLM(shape, load_format="dummy", skip_tokenizer_init=True, kv_cache_config=cache, **SIZES) as llm:
        yield llm


@pytest.fixture
def asked(real_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One engine for every command, since each takes seconds to compile; what the commands asked for is kept."""
    arguments: list[dict[str, Any]] = []

    def open_again(**asked_for: Any) -> Any:
        arguments.append(asked_for)
        return nullcontext(real_llm)

    monkeypatch.setattr(trtllm_jax, "LLM", open_again)
    return arguments


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(bench_run, "_engine", fail)


class TestOptions:
    def test_the_help_needs_no_heavy_library(self) -> None:
        code = (
            "import sys\n"
            "from trtllm_jax.commands.bench.command import main\n"
            "main(['--help'], standalone_mode=False)\n"
            "print(sorted({'jax', 'numpy', 'rich', 'transformers', 'matplotlib'} & set(sys.modules)))"
        )
        printed = subprocess.check_output([sys.executable, "-c", code], text=True)
        assert printed.splitlines()[-1] == "[]"
        assert "trtllm-bench --model M throughput --num_requests 500 --concurrency 64\n" in printed

    @pytest.mark.parametrize("form", ["throughput", "latency", "startup"])
    def test_every_form_has_help(self, form: str) -> None:
        assert "--kv_cache_free_gpu_mem_fraction" in run(form, "--help").output

    @staticmethod
    def parse(*words: str) -> Common:
        """What the words mean before and after a command's name."""
        found: list[Common] = []

        @click.group(context_settings=main.context_settings)
        @common_options
        def group(**_: Any) -> None: ...

        @group.command()
        @common_options
        @click.pass_context
        def form(ctx: click.Context, /, **_: Any) -> None:
            found.append(Common.of(ctx))

        group.main(list(words), standalone_mode=False)
        return found[0]

    @pytest.mark.parametrize("words", [("--max-batch-size", "7"), ("--max_batch_size=7",)])
    def test_both_spellings_before_and_after_the_command(self, words: tuple[str, ...]) -> None:
        for given in (("-m", "x", *words, "form"), ("form", "--model", "x", *words)):
            assert self.parse(*given).max_batch_size == 7

    def test_the_nearer_option_wins(self) -> None:
        common = self.parse("-m", "far", "--tp", "2", "--seed", "5", "form", "-m", "near", "--tp_size", "3")
        assert (common.model, common.tp, common.seed) == ("near", 3, 5)

    def test_arguments_of_the_engine(self, tmp_path: Path) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("max_batch_size: 3\nstream_interval: 2\nkv_cache_config: {max_tokens: 5, dtype: float32}\n")
        words = ("form", "-m", "x", "--config", str(config), "--kv_cache_max_tokens", "9", "--dtype", "float32")
        assert self.parse(*words).llm_arguments(batch=8, length=100) == {
            "model": "x",
            "skip_tokenizer_init": True,
            "max_batch_size": 3,
            "max_seq_len": 100,
            "stream_interval": 2,
            "dtype": "float32",
            "kv_cache_config": {"enable_block_reuse": False, "max_tokens": 9, "dtype": "float32"},
        }
        arguments = self.parse(*words, "--max_batch_size", "4", "--max_seq_len", "200").llm_arguments(
            batch=8, length=100, reuse=True
        )
        assert (arguments["max_batch_size"], arguments["max_seq_len"]) == (4, 200)
        assert arguments["kv_cache_config"]["enable_block_reuse"]

    def test_sampling(self) -> None:
        assert self.parse("form", "-m", "x").sampling == {}
        sampled = self.parse("form", "-m", "x", "--temperature", "0.5", "--top_k", "9").sampling
        assert sampled == {"temperature": 0.5, "top_k": 9, "seed": 420}


@pytest.mark.usefixtures("no_engine")
class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--foo",), "No such option"),
            (("--backend", "triton"), "'triton' is not one of 'jax', 'pytorch', 'tensorrt'"),
            (("--batch_size", "8,x"), "'8,x' is not a list of positive integers: write for example 1,8,32"),
            (("--output_len", "1"), "output_len = 1 leaves no decode step to measure: use at least 2"),
            (("--input_len", "300"), "428 tokens, prompt and answer, and the model's longest sequence has 256"),
            (("--max_seq_len", "64"), "max_seq_len = 64 is too small: a request of this workload has 256 tokens"),
            (("--max_batch_size", "4", "--batch_size", "1,8"), "max_batch_size = 4 is below batch_size = 8"),
            (("--batch_size", "8", "throughput"), "--batch_size is for fixed batches: leave it or 'throughput' out"),
            (("--profile", "latency"), "--profile took 'latency' for its folder: write --profile=DIR latency"),
            (("throughput", "--concurrency", "a"), "'a' is not a list of positive integers"),
            (("throughput", "--target_input_len", "250"), "506 tokens, prompt and answer"),
            (("latency", "--cached_prefix", "512"), "cached_prefix = 512 is not below the prompt's 512 tokens"),
            (("latency", "--cached_prefix", "8", "--warmup", "0"), "--cached_prefix needs random prompts and warm-up"),
            (("startup", "--profile=x"), "startup has nothing to profile or plot"),
        ],
    )
    def test_what_is_wrong_is_said_before_the_engine_starts(
        self, shape: Path, words: tuple[str, ...], said: str
    ) -> None:
        assert said in refused("--model", shape, *words)

    def test_models(self, tmp_path: Path) -> None:
        assert "Missing option '--model'" in refused()
        assert "no such folder or file" in refused("--model", tmp_path / "nowhere")
        (tmp_path / "config.json").write_text("{}")
        assert "has no vocab_size" in refused("--model", tmp_path)

    def test_a_config_that_is_no_mapping(self, shape: Path, tmp_path: Path) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("- 1")
        assert "is not a mapping" in refused("--model", shape, "--config", config)
        config.write_text("kv_cache_config: {enable_block_reuse: false}")
        words = ("latency", "--config", config, "--target_input_len", "32", "--cached_prefix", "16")
        assert "--cached_prefix needs block reuse" in refused("--model", shape, *words)

    def test_a_wrong_line_of_a_dataset(self, shape: Path, tmp_path: Path) -> None:
        dataset = tmp_path / "data.jsonl"
        dataset.write_text('{"input_ids": [1, 258], "output_tokens": 1}\n')
        words = ("throughput", "--dataset", dataset)
        assert "line 1: input_ids has 258; ids of this model are 0 to 257" in refused("--model", shape, *words)


def test_arguments_that_the_engine_refuses_are_one_line(shape: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_sequence: 8")
    assert "LLM got invalid argument: max_sequence" in refused("-m", shape, "--config", config)


def test_too_few_devices_are_one_line(shape: Path) -> None:
    assert "tensor_parallel_size=64 needs that many devices" in refused(
        "-m", shape, "--load_format", "dummy", "--tp", "64"
    )


def test_a_sweep_of_fixed_batches(shape: Path, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    report, plot, traces = tmp_path / "report.json", tmp_path / "plot.png", tmp_path / "traces"
    words = (
        "-m", shape, "--load_format", "dummy", "--batch_size", "1,2,40", "--input_len", "12",
        "--output_len", "5", "--repeats", "2", "--report_json", report, "--plot", plot, f"--profile={traces}",
    )  # fmt: skip
    result = run(*words)
    assert result.exit_code == 0, result.output
    # 40 rows of one page of 32 tokens, and the cache has 1024.
    assert "Skipped: batch_size = 40 with 17 tokens each needs 1280 tokens of KV cache" in result.stderr
    assert "Fixed batches, medians" in result.stdout
    assert "trtllm_jax-engine" in result.stdout

    written = json.loads(report.read_text())
    expected = {"load_format": "dummy", "max_batch_size": 40, "max_seq_len": 17, "skip_tokenizer_init": True}
    assert asked == [{"model": str(shape), "kv_cache_config": {"enable_block_reuse": False}, **expected}]
    assert written["llm"] == asked[0]
    batches = [one for one in written["results"] if one["kind"] == "batch"]
    assert [(one["batch_size"], one["input_len"], one["output_len"]) for one in batches] == [(1, 12, 5), (2, 12, 5)]
    assert all(len(one["all_seconds"]) == 2 for one in batches)
    profiles = [one for one in written["results"] if one["kind"] == "profile"]
    assert len(profiles) == 2
    for one in profiles:
        assert Path(one["trace"]).is_relative_to(traces)
        assert Path(one["trace"]).name.endswith(".trace.json.gz")
        by_name = {program["name"]: program for program in one["programs"]}
        decode = "jit_decode_loop_with_extras"  # a CPU's decode programs have room for them
        assert {decode, "jit_ragged_step"} <= by_name.keys()
        assert by_name[decode]["groups_ms"]["matmul"] > 0
        assert by_name[decode]["total_ms"] > by_name[decode]["groups_ms"]["matmul"]
        assert one["host_cpu_seconds"]["trtllm_jax-engine"] > 0
        assert one["decode_steps"] == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_throughput_of_a_dataset_of_texts(
    shape: Path, tiny_llama: Path, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    dataset = tmp_path / "data.jsonl"
    lines = [{"task_id": i, "prompt": "x" * (i + 3), "output_tokens": i % 3 + 1} for i in range(6)]
    dataset.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("throughput", "--dataset", dataset, "--concurrency", "2,3", "--num-requests", "5", "--json_lines")
    result = run("--model", "a name", "--model_path", shape, "--tokenizer", tiny_llama, *words)
    assert result.exit_code == 0, result.output
    (arguments,) = asked
    assert (arguments["model"], arguments["max_batch_size"], arguments["max_seq_len"]) == (str(shape), 3, 9)
    two, three = records(result.stdout)
    assert (two["concurrency"], three["concurrency"]) == (2, 3)
    for one in (two, three):
        assert (one["num_requests"], one["input_tokens"], one["output_tokens"]) == (5, 25, 9)
        assert one["TTFT (ms)"]["p50"] <= one["E2E Latency (ms)"]["p50"]
        assert one["Total Output Throughput (tokens/sec)"] == pytest.approx(9e3 / one["Total Latency (ms)"])


@pytest.mark.usefixtures("asked")
def test_latency_with_a_cached_prefix(shape: Path, real_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own counters say how much of each prompt it found."""
    reused: list[int] = []
    measure = bench_run.measure_requests

    def counted(llm: Any, requests: Any, **how: Any) -> Any:
        result = measure(llm, requests, **how)
        reused.append(llm.get_stats()[-1]["kvCacheStats"]["reusedBlocks"])
        return result

    real_llm.generate([1], use_tqdm=False, sampling_params=trtllm_jax.SamplingParams(max_tokens=1, end_id=-1))
    before = real_llm.get_stats()[-1]["kvCacheStats"]["reusedBlocks"]

    monkeypatch.setattr(bench_run, "measure_requests", counted)
    words = ("latency", "--target_input_len", "160", "--target_output_len", "2", "--num_requests", "4")
    result = run("-m", shape, *words, "--cached_prefix", "128", "--json_lines")
    assert result.exit_code == 0, result.output
    (record,) = records(result.stdout)
    assert record["cached_prefix"] == 128
    warm, measured = reused
    # 128 tokens are 4 blocks, and the first of two warm-up requests finds none.
    assert (warm - before, measured - warm) == (4, 4 * 4)


@pytest.mark.usefixtures("asked")
def test_only_whole_blocks_of_a_prefix_count(shape: Path) -> None:
    words = ("-m", shape, "latency", "--target_input_len", "120", "--target_output_len", "2", "--num_requests", "2")
    (record,) = records(run(*words, "--cached_prefix", "100", "--json_lines").stdout)
    assert record["cached_prefix"] == 96
    assert "less than a block of 32 tokens" in refused(*words, "--cached_prefix", "20")


@pytest.mark.usefixtures("asked")
def test_interruption_reports_what_was_measured(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure: Callable[..., Any] = bench_run.measure_batch
    calls: list[int] = []

    def interrupted(llm: Any, batch: int, *sizes: int, **how: Any) -> Any:
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(llm, batch, *sizes, **how)

    monkeypatch.setattr(bench_run, "measure_batch", interrupted)
    words = ("--batch_size", "1,2", "--input_len", "8", "--output_len", "3", "--repeats", "1")
    result = run("-m", shape, *words)
    assert (result.exit_code, calls) == (1, [1, 2])
    assert "Aborted!" in result.stderr
    assert "Fixed batches, medians" in result.stdout


@pytest.mark.slow
def test_two_starts(shape: Path) -> None:
    words = ("startup", "--target_input_len", "8", "--max_num_tokens", "16", "--kv_cache_max_tokens", "64")
    result = run("-m", shape, "--load_format", "dummy", "--dtype", "float32", *words, "--json_lines")
    assert result.exit_code == 0, result.output
    cold, warm = records(result.stdout)
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    for one in (cold, warm):
        parts = [one[name] for name in ("import_s", "load_s", "compile_s", "first_token_s")]
        assert min(parts) > 0
        assert one["total_s"] == pytest.approx(sum(parts))
    assert warm["compile_s"] < cold["compile_s"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("max_seq_len: abc", "max_seq_len = 'abc' is not an integer"),
        ("max_batch_size: '8'", "max_batch_size = '8' is not an integer"),
        ("1: 2", "is not a mapping"),
        ("kv_cache_config: 3", "kv_cache_config is not a mapping"),
    ],
)
def test_a_configuration_of_wrong_types_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "wrong.yaml").write_text(content)
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    result = CliRunner().invoke(
        main, ["--model", str(tmp_path), "--config", str(tmp_path / "wrong.yaml"), "--batch_size", "1"]
    )
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.split())


def test_a_report_into_a_folder_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--model", "none", "--report_json", str(tmp_path / "no" / "r.json")])
    assert result.exit_code == 2
    assert "is not in an existing folder" in " ".join(result.output.split())
