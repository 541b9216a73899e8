"""Compares this engine with transformers on PyTorch, with the same weights on the same machine.

    python benchmarks/against_transformers.py [--rounds 3] [--threads 2] [--cases batch1 batch8 mixed]
                                              [--dtypes float32 bfloat16]

Prints one JSON line for each result. Each side runs in its own process, and the sides alternate, so that changes of the
machine's speed affect both. Every dtype of each side is measured; the last lines compare the fastest ones by their
medians. A rate is generated tokens over the wall time of the whole generation, prefill included, after a short warm-up;
the best of three if one takes seconds. Prompts are random ids (seed 0): "mixed" is 32 prompts of 16 to 256 tokens with
16 to 128 generated tokens each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = ("float32", "bfloat16")
Case = tuple[list[list[int]], list[int]]


def case(name: str) -> Case:
    """Prompts, and the number of tokens to generate for each."""
    rng = np.random.default_rng(0)
    if name == "mixed":
        lengths, new = rng.integers(16, 257, 32), rng.integers(16, 129, 32)
    else:
        batch, count = {"warmup": (2, 8), "batch1": (1, 128), "batch8": (8, 128)}[name]
        lengths, new = np.full(batch, 32), np.full(batch, count)
    return [rng.integers(1000, 40000, length).tolist() for length in lengths], new.tolist()


def model_path() -> Path:
    """The packaged SmolLM2-135M-Instruct."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from demo import packaged_model

    return packaged_model()


def ours(dtype: str, cases: list[str]) -> dict[str, Callable[[], int]]:
    """A function for each case that generates with `LLM` and returns the number of generated tokens."""
    from trtllm_jax import LLM, SamplingParams

    llm = LLM(model_path(), dtype=dtype, max_batch_size=32, max_num_tokens=512, max_seq_len=512,
              kv_cache_config={"enable_block_reuse": False})  # fmt: skip

    def run(prompts: list[list[int]], new: list[int]) -> int:
        params = [SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False) for count in new]
        return sum(output.outputs[0].length for output in llm.generate(prompts, params, use_tqdm=False))

    return {name: lambda name=name: run(*case(name)) for name in cases}


def transformers(dtype: str, cases: list[str]) -> dict[str, Callable[[], int]]:
    """The same functions with transformers: prompts are padded on the left, and all generate as long as the longest."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    path = model_path()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], new: list[int]) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, max_new_tokens=max(new), do_sample=False, pad_token_id=0)
        return sum(new)

    return {name: lambda name=name: run(*case(name)) for name in cases}


def measure(side: str, dtype: str, cases: list[str]) -> None:
    """In the child process: measure every case and print a JSON line for each."""
    runs = (ours if side == "ours" else transformers)(dtype, ["warmup", *cases])
    runs.pop("warmup")()
    for name, run in runs.items():
        rates = []
        for _ in range(1 if name == "mixed" else 3):
            started = time.perf_counter()
            tokens = run()
            rates.append(tokens / (time.perf_counter() - started))
        print(
            json.dumps({"case": name, "side": side, "dtype": dtype, "tokens_per_s": round(max(rates), 1)}), flush=True
        )


def compare(rounds: int, threads: int, cases: list[str], dtypes: list[str]) -> None:
    """In the parent process: run the sides alternately, print their lines, then the ratios."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--cases", *cases]
    if sys.platform == "linux":
        command = ["taskset", "-c", f"0-{threads - 1}", *command]
    rates: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(rounds):
        for side in ("transformers", "ours"):
            for dtype in dtypes:
                child = [*command, "--side", side, "--dtype", dtype]
                out = subprocess.run(child, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                for line in out.splitlines():
                    print(line, flush=True)
                    row: dict[str, Any] = json.loads(line)
                    rates.setdefault((row["case"], side, dtype), []).append(row["tokens_per_s"])
    for name in cases:
        best = {
            side: max((statistics.median(rates[name, side, dtype]), dtype) for dtype in dtypes)
            for side in ("transformers", "ours")
        }
        ratio = best["ours"][0] / best["transformers"][0]
        print(json.dumps({"case": name, "median_of_fastest_dtype": best, "ratio": round(ratio, 2)}), flush=True)


def main() -> None:
    """Parse the options, then compare, or measure one side as the child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=["batch1", "batch8", "mixed"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--side", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure(args.side, args.dtype, args.cases)
    else:
        compare(args.rounds, args.threads, args.cases, args.dtypes)


if __name__ == "__main__":
    main()
