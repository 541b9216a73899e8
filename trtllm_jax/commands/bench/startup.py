"""How long a fresh process takes to its first token: a child process that times itself, and the parent that starts it.

    python -P -m trtllm_jax.commands.bench.startup BEGAN

The child reads what to do as JSON on stdin. BEGAN is the parent's `time.monotonic()`, a clock that processes share.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from trtllm_jax.commands.bench.measure import sampling_params
from trtllm_jax.commands.bench.results import StartUpResult


def measure_startup(
    llm_arguments: Mapping[str, Any], prompt: list[int], sampling: Mapping[str, Any]
) -> Iterator[StartUpResult]:
    """A start with an empty compilation cache, then one with the cache that it left.

    Args:
        llm_arguments: what `LLM` takes; must be JSON.
        prompt: ids of the first request.
        sampling: what `SamplingParams` takes besides lengths.

    Raises:
        ValueError: a child failed; it has said why on stderr.
    """
    work = json.dumps({"llm": llm_arguments, "prompt": prompt, "sampling": sampling}, default=str)
    with tempfile.TemporaryDirectory() as folder:
        # The same cache as the package keeps for its user, with the same rule that every program is worth keeping.
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for cache in ("cold", "warm"):
            command = [sys.executable, "-P", "-m", __spec__.name, str(time.monotonic())]
            child = subprocess.run(command, input=work, env=environment, stdout=subprocess.PIPE, text=True)
            if child.returncode:
                raise ValueError(f"startup: the {cache} start failed with exit code {child.returncode}; see above")
            yield StartUpResult(cache=cache, **json.loads(child.stdout.splitlines()[-1]))


def _start(began: float, work: Mapping[str, Any]) -> dict[str, float]:
    from trtllm_jax import LLM

    imported = time.monotonic()
    with LLM(**work["llm"]) as llm:
        built = time.monotonic()
        llm.generate(work["prompt"], sampling_params(1, work["sampling"]), use_tqdm=False)
        done = time.monotonic()
        compile_s = llm.compile_seconds
    return {
        "import_s": imported - began,
        "load_s": built - imported - compile_s,
        "compile_s": compile_s,
        "first_token_s": done - built,
    }


def main() -> None:
    """Run as the child process."""
    try:
        times = _start(float(sys.argv[1]), json.load(sys.stdin))
    except (ValueError, MemoryError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.stdout.write(f"{json.dumps(times)}\n")


if __name__ == "__main__":
    main()
