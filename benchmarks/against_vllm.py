"""The protocol by which vLLM was measured, on one GPU: Llama-3.1-8B's shape, random weights, mostly greedy decoding.

    python benchmarks/against_vllm.py [--only decode throughput prefill context first arrivals sampled cached]

Prints one JSON line for each result, from the measurements of `trtllm-bench`: decoding with 128 input and 256 output
tokens for batches up to 256; 500 requests with 512 input and 256 output tokens; prefill of 8 prompts of 4,096; decoding
at a context of 4,096; time to first token without and with a cached prefix; arrivals at 8 requests a second; and
sampling against greedy decoding. The prefix cache is off, except for its own measurement.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from llama_8b import LLAMA_8B

from trtllm_jax import LLM
from trtllm_jax.commands.bench.measure import measure_batch, measure_first_token, measure_requests
from trtllm_jax.commands.bench.workload import synthetic_requests

VOCAB = LLAMA_8B["vocab_size"]
NUCLEUS = {"temperature": 0.8, "top_p": 0.9}
PARTS = ("decode", "sampled", "first", "prefill", "context", "arrivals", "throughput", "cached")


def start(folder: str, **sizes: Any) -> LLM:
    """An engine, and how long it took."""
    began = time.perf_counter()
    llm = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, max_seq_len=4608, **sizes
    )  # fmt: skip
    print_record("start", seconds=time.perf_counter() - began, **llm.get_kv_cache_capacity())
    return llm


def print_record(test: str, **figures: Any) -> None:
    """Print one line of JSON."""
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps({"test": test, **rounded}), flush=True)


def batch(llm: LLM, test: str, rows: int, input_len: int, output_len: int, **named: Any) -> float | None:
    """Print one result of `measure_batch`; returns the milliseconds of a step, None if it is below the noise."""
    result = measure_batch(llm, rows, input_len, output_len, vocab=VOCAB, **{"repeats": 2, **named})
    step = result.step_s and result.step_s * 1e3
    rates = {"decode_tok_s": result.decode_tokens_per_s, "prefill_tok_s": result.prefill_tokens_per_s,
             "total_tok_s": result.total_tokens_per_s}  # fmt: skip
    print_record(test, batch=rows, input_len=input_len, step_ms=step, first_ms=result.first_token_s * 1e3, **rates)
    return step


def requests(llm: LLM, test: str, count: int, input_len: int, output_len: int, **named: Any) -> None:
    """Print one result of `measure_requests`."""
    work = synthetic_requests(count, input_len, output_len, vocab=VOCAB)
    result = measure_requests(llm, work, **named)
    total = result.throughputs["Total Token Throughput (tokens/sec)"]
    times = {name: values.record() for name, values in result.latencies.items() if values}
    shown = {
        f"{name}_{point}_ms": times[name][point] for name in ("TTFT", "ITL", "TPOT") for point in ("p50", "p99", "max")
    }
    print_record(test, requests=count, total_tok_s=total, **shown)


def main() -> None:
    """Every part, in one process and at most two engines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128, 256])
    only = set((args := parser.parse_args()).only)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B))
        if only - {"cached"}:
            with start(folder, max_batch_size=256, kv_cache_config={"enable_block_reuse": False}) as llm:
                measure(llm, only, args.batches)
        if "cached" in only:
            with start(folder, max_batch_size=8, max_num_tokens=4096) as llm:
                result = measure_first_token(llm, 4096, vocab=VOCAB, cached=4032, repeats=5)
                print_record("first_token_cached", **result.record())


def measure(llm: LLM, only: set[str], batches: list[int]) -> None:
    """The parts that need no prefix cache."""
    if "decode" in only:
        for rows in batches:
            batch(llm, "decode", rows, 128, 256)
    if "sampled" in only:
        greedy = batch(llm, "greedy", 64, 128, 256)
        drawn = batch(llm, "sampled", 64, 128, 256, sampling=NUCLEUS)
        print_record("sampling", over_greedy_percent=(drawn / greedy - 1) * 100 if drawn and greedy else None)
    if "first" in only:
        for length in (128, 1024, 4096):
            print_record("first_token", **measure_first_token(llm, length, vocab=VOCAB, repeats=7).record())
    if "prefill" in only:
        batch(llm, "prefill", 8, 4096, 2)
    if "context" in only:
        for rows in (1, 32):
            batch(llm, "decode_context", rows, 4096, 128, warmup=0)
    if "arrivals" in only:
        requests(llm, "arrivals", 96, 1024, 256, request_rate=8.0)
    if "throughput" in only:
        batch(llm, "throughput", 500, 512, 256, warmup=0, repeats=1)


if __name__ == "__main__":
    main()
