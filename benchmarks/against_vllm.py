"""The protocol by which vLLM was measured, on one GPU: random weights, mostly greedy decoding.

    python benchmarks/against_vllm.py [--only decode throughput prefill context first arrivals sampled cached]
                                      [--shape llama-3.1-8b] [--batches 1 8 32 128 256] [--when-needed]
                                      [--context 4096] [--context-rows 1 32]

Prints one JSON line for each result, from the measurements of `trtllm-bench`: decoding with 128 input and 256 output
tokens for batches up to 256, beside the least time of a step; 500 requests with 512 input and 256 output tokens;
prefill of 8 prompts of 4,096; decoding at a context of 4,096; time to first token without and with a cached prefix;
arrivals at 8 requests a second; and sampling against greedy decoding. The prefix cache is off, except for its own
measurement. `--when-needed` compiles only the programs that are measured.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import SHAPES, decode_floor_ms

from trtllm_jax import LLM
from trtllm_jax.commands.bench.measure import measure_batch, measure_first_token, measure_requests
from trtllm_jax.commands.bench.workload import synthetic_requests

NUCLEUS = {"temperature": 0.8, "top_p": 0.9}
READ_TB_S, PEAK_TFLOP_S = 4.55, 800.0
"""What one H200 was measured to reach, in bfloat16."""
PARTS = ("decode", "sampled", "first", "prefill", "context", "arrivals", "throughput", "cached")


def start(folder: str, **options: Any) -> LLM:
    """An engine, and how long it took."""
    began = time.perf_counter()
    llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, **options)
    print_record("start", seconds=time.perf_counter() - began, **llm.get_kv_cache_capacity())
    return llm


def print_record(test: str, **figures: Any) -> None:
    """Print one line of JSON."""
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps({"test": test, **rounded}), flush=True)


@dataclass(frozen=True)
class Protocol:
    """The measurements of one engine for the model of `config`."""

    llm: LLM
    config: dict[str, Any]

    @property
    def vocab(self) -> int:
        """Prompts are drawn from ids below it."""
        return int(self.config["vocab_size"])

    def batch(self, test: str, rows: int, input_len: int, output_len: int, **named: Any) -> float | None:
        """Print one result of `measure_batch`; returns the milliseconds of a step, None if it is below the noise."""
        options = {"repeats": 2, **named}
        result = measure_batch(self.llm, rows, input_len, output_len, vocab=self.vocab, **options)
        step = result.step_s and result.step_s * 1e3
        floor = decode_floor_ms(self.config, rows, input_len + output_len // 2, READ_TB_S, PEAK_TFLOP_S)
        rates = {"decode_tok_s": result.decode_tokens_per_s, "prefill_tok_s": result.prefill_tokens_per_s,
                 "total_tok_s": result.total_tokens_per_s, "of_floor": step and floor / step}  # fmt: skip
        print_record(test, batch=rows, input_len=input_len, step_ms=step, first_ms=result.first_token_s * 1e3, **rates)
        return step

    def requests(self, test: str, count: int, input_len: int, output_len: int, **named: Any) -> None:
        """Print one result of `measure_requests`."""
        work = synthetic_requests(count, input_len, output_len, vocab=self.vocab)
        result = measure_requests(self.llm, work, **named)
        total = result.throughputs["Total Token Throughput (tokens/sec)"]
        times = {name: values.record() for name, values in result.latencies.items() if values}
        shown = {
            f"{name}_{point}_ms": times[name][point]
            for name in ("TTFT", "ITL", "TPOT")
            for point in ("p50", "p99", "max")
        }
        print_record(test, requests=count, total_tok_s=total, **shown)

    def first_token(self, test: str, length: int, **named: Any) -> None:
        """Print one result of `measure_first_token`."""
        print_record(test, **measure_first_token(self.llm, length, vocab=self.vocab, **named).record())

    def measure(self, only: set[str], batches: list[int], context: int, context_rows: list[int]) -> None:
        """The parts that need no prefix cache."""
        if "decode" in only:
            for rows in batches:
                self.batch("decode", rows, 128, 256)
        if "sampled" in only:
            greedy = self.batch("greedy", 64, 128, 256)
            drawn = self.batch("sampled", 64, 128, 256, sampling=NUCLEUS)
            print_record("sampling", over_greedy_percent=(drawn / greedy - 1) * 100 if drawn and greedy else None)
        if "first" in only:
            for length in (128, 1024, 4096):
                self.first_token("first_token", length, repeats=7)
        if "prefill" in only:
            self.batch("prefill", 8, 4096, 2)
        if "context" in only:
            for rows in context_rows:
                self.batch("decode_context", rows, context, 128, warmup=0)
        if "arrivals" in only:
            self.requests("arrivals", 96, 1024, 256, request_rate=8.0)
        if "throughput" in only:
            self.batch("throughput", 500, 512, 256, warmup=0, repeats=1)


def main() -> None:
    """Every part, in one process and at most two engines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128, 256])
    parser.add_argument("--context", type=int, default=4096, help="tokens of the prompts of the part 'context'")
    parser.add_argument("--context-rows", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--when-needed", action="store_true")
    only = set((args := parser.parse_args()).only)
    config = SHAPES[args.shape]
    options = {"max_seq_len": max(4096, args.context) + 512, "enforce_eager": args.when_needed}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        if only - {"cached"}:
            with start(folder, max_batch_size=256, kv_cache_config={"enable_block_reuse": False}, **options) as llm:
                Protocol(llm, config).measure(only, args.batches, args.context, args.context_rows)
        if "cached" in only:
            with start(folder, max_batch_size=8, max_num_tokens=4096, **options) as llm:
                Protocol(llm, config).first_token("first_token_cached", 4096, cached=4032, repeats=5)


if __name__ == "__main__":
    main()
