"""The examples that need no model of their own do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import jax
import pytest

from trtllm_jax import LLM

ROOT = Path(__file__).parent.parent


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
    example = runpy.run_path(str(ROOT / "examples" / "reinforce.py"))
    rewards = example["learn"](tmp_path)
    assert rewards[0] < 0.35  # a quarter by chance
    assert rewards[-1] > 0.7
    assert same == [True] * len(rewards)
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split("reward ")[1].split(",")[0]) for line in lines] == pytest.approx(rewards, abs=0.005)
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-4 for line in lines)
