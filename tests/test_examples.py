"""The example scripts run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_quickstart_continues_its_prompts(smollm2_gguf: Path) -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", smollm2_gguf], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "'The capital of France is' -> ' Paris" in run.stdout
    assert len(run.stdout.splitlines()) == 3
