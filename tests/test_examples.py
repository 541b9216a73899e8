"""The example scripts do what their docstrings say."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from trtllm_jax import LLM

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_quickstart_continues_its_prompts(smollm2_gguf: Path) -> None:
    run = subprocess.run([sys.executable, EXAMPLES / "quickstart.py", smollm2_gguf], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "'The capital of France is' -> ' Paris" in run.stdout
    assert len(run.stdout.splitlines()) == 3


@pytest.mark.slow
def test_reinforce_learns_and_the_engine_reads_the_trainers_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update, same = LLM.update_weights, []

    def watched(llm: LLM, params: Any) -> None:
        update(llm, params)
        pairs = zip(jax.tree.leaves(llm.params), jax.tree.leaves(params), strict=True)
        same.append(all(ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer() for ours, theirs in pairs))

    monkeypatch.setattr(LLM, "update_weights", watched)
    rewards = runpy.run_path(str(EXAMPLES / "reinforce.py"))["learn"](tmp_path)
    assert rewards[0] < 0.35  # a quarter by chance
    assert rewards[-1] > 0.7
    assert same == [True] * len(rewards)
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split("reward ")[1].split(",")[0]) for line in lines] == pytest.approx(rewards, abs=0.005)
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-4 for line in lines)
