from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from trtllm_jax.commands.convert import main


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets JAX_PLATFORMS for its own process."""
    monkeypatch.setenv("JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_options_reach_the_conversion(tiny_llama: Path, tmp_path: Path) -> None:
    there = run(tiny_llama, tmp_path / "orbax", "--format", "orbax")
    assert there.exit_code == 0, there.output
    assert there.output.startswith(f"{tmp_path / 'orbax'}: 0.")
    # Either spelling.
    back = run(tmp_path / "orbax", tmp_path / "back", "--dtype", "float16", "--max-shard-size", "100KB")
    assert back.exit_code == 0, back.output
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert run(tmp_path / "orbax", tmp_path / "back", "--max_shard_size=1GB", "--overwrite").exit_code == 0
    (file,) = (tmp_path / "back").glob("*.safetensors")
    assert load_file(file).keys() == load_file(tiny_llama / "model.safetensors").keys()
    (tmp_path / "orbax" / "config.json").unlink()
    bare = run(tmp_path / "orbax", tmp_path / "with_config", "--config", tiny_llama, "--tokenizer", tiny_llama)
    assert bare.exit_code == 0, bare.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing/at/all/here", "out"), "Error: model 'nothing/at/all/here': there is no such folder or file"),
        (("SOURCE", "/proc/out"), "Error: output = /proc/out cannot be written: "),
        (("SOURCE", "out", "--max_shard_size", "big"), "Error: max_shard_size = 'big' is not a size"),
        (("SOURCE", "out", "--format", "onnx"), "Invalid value for '--format': 'onnx'"),
        (("SOURCE", "SOURCE"), "contain one another: choose another output"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: tuple[str, ...], message: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(tiny_llama if argument == "SOURCE" else argument for argument in arguments))
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_help_needs_no_jax() -> None:
    program = "import sys; from trtllm_jax.commands.convert import main; main(['--help'], standalone_mode=False); "
    program += "print([name for name in ('jax', 'transformers', 'orbax', 'tensorstore') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--max_shard_size" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
