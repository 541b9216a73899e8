"""Programs that end while requests run, in order: the arrival of a step in flight calls back into Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..tiny_engine import CACHE, SIZES

BEGIN = f"""
import os, signal, sys, threading
from trtllm_jax import LLM, SamplingParams
from trtllm_jax.llmapi import KvCacheConfig
llm = LLM(sys.argv[1], kv_cache_config=KvCacheConfig(**{CACHE}), **{SIZES})
params = SamplingParams(max_tokens=140, ignore_eos=True, detokenize=False)
prompts = [[1, 2, 3], [4, 5], [6]]
"""
FIRST_STEP = "for output in llm.generate([7, 8], params, streaming=True):\n    "
FIRST = "a stream that is left"
ENDS = {
    FIRST: (FIRST_STEP + "break", 0),
    "an exception": (FIRST_STEP + "raise KeyError('of the program')", 1),
    "sys.exit": (FIRST_STEP + "sys.exit(7)", 7),
    "many that nobody waits for": ("outputs = [llm.generate_async(prompt, params) for prompt in prompts * 4]", 0),
    "shutdown at the end": (FIRST_STEP + "break\nllm.shutdown()", 0),
    "dropped while it runs": (FIRST_STEP + "break\ndel llm", 0),
    "Ctrl-C in generate": (
        "threading.Thread(target=lambda: (next(llm.generate([9], params, streaming=True)),"
        " os.kill(os.getpid(), signal.SIGINT))).start()\n"
        "llm.generate(prompts * 50, params)",
        -signal.SIGINT,
    ),
    "a fork that only exits": (
        "child = os.fork()\n"
        "if not child: sys.exit()\n"
        "os.waitpid(child, 0)\n"  # that it ends is ours: how is jax's, whose exit may kill such a child
        "assert len(llm.generate(prompts, params)) == 3",
        0,
    ),
}


@pytest.mark.parametrize(
    "ending", [name if name == FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ENDS]
)
def test_a_program_ends_in_order(ending: str, tiny_llama: Path, tmp_path: Path) -> None:
    body, code = ENDS[ending]
    # By the signal, or where threads were joined after it by the exception.
    codes = (code, 1) if code == -signal.SIGINT else (code,)
    program = tmp_path / "program.py"
    program.write_text(BEGIN + body)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "TRTLLM_LOG_LEVEL": "ERROR"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", program, tiny_llama],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ended.returncode in codes, ended.stderr
    assert ("KeyboardInterrupt" in ended.stderr) == (code == -signal.SIGINT)
    assert "Fatal Python error" not in ended.stderr
    assert "terminate called" not in ended.stderr
