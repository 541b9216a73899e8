"""What logit edits cost: tokens/s of answers by a JSON schema, with penalties, with a user's function, and with none.

    python benchmarks/guided.py --tokenizer FOLDER [--model MODEL] [--rows 8 64 256]

Without --model the engine has Llama-3.1-8B's shape and random weights. Prompts are 128 ids, answers `--output` tokens,
sampled; no answer of that length completes the schema. Prints one JSON line for each measurement, the better of two
rounds.
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
from trtllm_jax.llmapi import GuidedDecodingParams

ROUNDS = 2
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PEOPLE = GuidedDecodingParams(json={"type": "array", "items": PERSON, "minItems": 200})
PENALTIES = {"repetition_penalty": 1.05, "presence_penalty": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "free": {},
    "guided": {"guided_decoding": PEOPLE},
    "penalties": PENALTIES,
    "guided, penalties": {"guided_decoding": PEOPLE, **PENALTIES},
    "function": {"logits_processor": lambda *_: None},
}


def main() -> None:
    """Measure every number of rows with every setting, with one engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer")
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--output", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B))
        random = {"load_format": "dummy"} if args.model is None else {}
        began = time.perf_counter()
        with LLM(
            args.model or folder, tokenizer=args.tokenizer, max_seq_len=1024, max_batch_size=max(args.rows), **random
        ) as llm:
            print(json.dumps({"start_s": round(time.perf_counter() - began, 1)}), flush=True)
            for rows in args.rows:
                measure(llm, rows, args.output)


def measure(llm: LLM, rows: int, output: int) -> None:
    """Print a line for each setting."""
    best = dict.fromkeys(SETTINGS, 0.0)
    for _ in range(ROUNDS):
        for name, setting in SETTINGS.items():
            best[name] = max(best[name], rate(llm, rows, output, setting))
    for name, tokens in best.items():
        print(json.dumps({"rows": rows, "what": name, "tok_s": round(tokens)}), flush=True)


def rate(llm: LLM, rows: int, output: int, setting: dict[str, Any]) -> float:
    """Generated tokens/s of `rows` requests submitted at once."""
    params = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True, **setting)
    prompts = np.random.default_rng(0).integers(0, 10_000, (rows, 128)).tolist()
    began = time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return sum(answer.outputs[0].length for answer in answers) / seconds


if __name__ == "__main__":
    main()
