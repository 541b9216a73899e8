"""What log-probabilities and penalties cost the requests that use them, and the others: milliseconds a step.

    python benchmarks/extras.py [--shape 8b 1b tiny] [--rows 64 128] [--output 256] [--setting logprobs]

Random weights, greedy, prompts of 32 ids. Each setting is measured with one of the rows using it, and with all of them.
The figure is the time of all answers divided by their length, the least of three rounds, and its ratio to rows without
any setting. Prints one JSON line for each measurement.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from shapes import LLAMA_8B

from trtllm_jax import LLM, SamplingParams

ROUNDS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA_8B,
    "1b": LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                      "tie_word_embeddings": True},
    "tiny": LLAMA_8B | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "logprobs": {"logprobs": 1},
    "repetition": {"repetition_penalty": 1.1},
    "presence and frequency": {"presence_penalty": 0.4, "frequency_penalty": 0.2},
    "n-grams": {"no_repeat_ngram_size": 3},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 0},
}


def main() -> None:
    """Measure every number of rows with every setting, with one engine for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--max_seq_len", type=int, default=1024)
    args = parser.parse_args()
    for shape in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(SHAPES[shape]))
            began = time.perf_counter()
            with LLM(
                folder, load_format="dummy", skip_tokenizer_init=True, max_batch_size=max(args.rows),
                max_seq_len=args.max_seq_len,
            ) as llm:  # fmt: skip
                print_record(shape=shape, start_s=round(time.perf_counter() - began, 1))
                if hasattr(llm, "warm_up"):
                    llm.warm_up()
                for rows in args.rows:
                    measure(llm, shape, rows, args.output, ["none", *args.setting])


def measure(llm: LLM, shape: str, rows: int, output: int, sampling: list[str]) -> None:
    """Print a line for each setting and number of rows that use it."""
    best: dict[tuple[str, int], float] = {}
    for _ in range(ROUNDS):
        for name in dict.fromkeys(sampling):
            for users in (1, rows):
                seconds = generate(llm, rows, users, output, SETTINGS[name])
                best[name, users] = min(best.get((name, users), np.inf), seconds)
    plain = min(best["none", 1], best["none", rows])
    for (name, users), seconds in best.items():
        print_record(shape=shape, rows=rows, setting=name, users=users, step_ms=round(seconds / output * 1e3, 3),
                     ratio=round(seconds / plain, 3))  # fmt: skip


def generate(llm: LLM, rows: int, users: int, output: int, setting: dict[str, Any]) -> float:
    """Seconds for `rows` requests submitted at once, of which `users` have the setting."""
    prompts = np.random.default_rng(0).integers(0, 500, (rows, 32)).tolist()
    params = [
        SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False, **(setting if row < users else {}))
        for row in range(rows)
    ]
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began


def print_record(**figures: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
