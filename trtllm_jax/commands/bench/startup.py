"""The time of a fresh process to its first token, measured in a child process.

    python -P -m trtllm_jax.commands.bench.startup BEGAN

runs the child, which reads its task as JSON from stdin. BEGAN is the parent's `time.monotonic()`; processes share this
clock.
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
    """Measure a start with an empty compilation cache, then one with the cache that the first has filled.

    Args:
        llm_arguments: arguments of `LLM`, serialisable as JSON.
        prompt: ids of the first request.
        sampling: arguments of `SamplingParams` besides lengths.

    Raises:
        ValueError: a child failed; its stderr says why.
    """
    work = json.dumps({"llm": llm_arguments, "prompt": prompt, "sampling": sampling}, default=str)
    with tempfile.TemporaryDirectory() as folder:
        # As the package configures its own compilation cache: programs are kept however short they took to compile.
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
