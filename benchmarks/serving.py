"""What a server costs: tokens/s of the same requests through `LLM` in one process, and over HTTP from others.

    python benchmarks/serving.py --tokenizer FOLDER [--simulate MS] [--concurrency 64 256] [--spread TOKENS]

On a GPU the engine has Llama-3.1-8B's shape and random weights. With --simulate nothing is computed: every step of the
real engine's loop, of at most 256 rows, takes MS milliseconds and returns random tokens, so that 12.8 ms correspond to
20,000 tokens/s. Requests are sampled, with 128 input and 256 output tokens, so that they begin and end together; with
--spread they have 256 - TOKENS to 256 + TOKENS output tokens. Each concurrency is measured alternately without and with
HTTP. Prints one JSON line for each result.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from shapes import LLAMA_8B

from trtllm_jax import LLM, SamplingParams
from trtllm_jax.engine import config, engine
from trtllm_jax.engine.packer import Packer
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.remote.host import EngineHost
from trtllm_jax.serve.config import ServerOptions
from trtllm_jax.serve.processes.frontends import Frontends

OUTPUT_RATE = "Total Output Throughput (tokens/sec)"
INPUT, OUTPUT, ROWS, IDS = 128, 256, 256, 10_000
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


class SimulatedStep(NamedTuple):
    """A plan, and the time at which its step ends."""

    plan: StepPlan
    ends: float


class SimulatedDevice:
    """Packer and runner in one: steps run in order, take `seconds` each, and draw random ids."""

    def __init__(self, packer: Packer, seconds: float) -> None:
        self.vocab, self.edits_at_once = packer.vocab, packer.edits_at_once
        self.params = None
        self._seconds = seconds
        self._free = 0.0
        self._rng = np.random.default_rng(0)

    def step(self, plan: StepPlan) -> StepPlan:
        """The plan itself, which `run` takes in place of dispatches."""
        return plan

    def extras(self, plan: StepPlan) -> Sequence[int]:
        """No rows, because nothing reports log-probabilities."""
        return ()

    def run(self, plan: StepPlan) -> SimulatedStep:
        """Queue a step behind those before it."""
        self._free = max(self._free, time.perf_counter()) + self._seconds
        return SimulatedStep(plan, self._free)

    def read(self, step: SimulatedStep) -> dict[str, np.ndarray]:
        """Wait until the step ends; the number of ids that each row gained, then the ids."""
        time.sleep(max(0.0, step.ends - time.perf_counter()))
        plan, rows = step.plan, len(step.plan.requests)
        gained = plan.emits if plan.kind == "ragged" else np.full(rows, plan.steps)
        ids = self._rng.integers(0, IDS, (rows, plan.steps))
        return {"tokens": np.concatenate([gained[:, None], ids], axis=1)}

    def with_cause(self, failure: BaseException) -> BaseException:
        """The failure, unchanged."""
        return failure

    def close(self) -> None:
        """Do nothing."""


def main() -> None:
    """Measure each concurrency without and with HTTP, with one engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--simulate", type=float, metavar="MS")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--client_processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests_per_row", type=int, default=4)
    parser.add_argument("--spread", type=int, default=0, metavar="TOKENS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = LLAMA_8B | (SMALL if args.simulate else {})
        Path(folder, "config.json").write_text(json.dumps(shape))
        arguments = {
            "model": folder, "load_format": "dummy", "tokenizer": args.tokenizer, "max_seq_len": 1024,
            "max_batch_size": ROWS, "kv_cache_config": {"enable_block_reuse": False},
        }  # fmt: skip
        if args.simulate:
            config.backend_defaults = engine.backend_defaults = lambda platform: config.BackendDefaults(ROWS, 8192, 1)
            arguments["kv_cache_config"] |= {"max_tokens": ROWS * 1024}
        began = time.perf_counter()
        with LLM(**arguments) as llm:
            print_record(start_s=time.perf_counter() - began)
            if args.simulate:
                device = SimulatedDevice(llm._engine._packer, args.simulate / 1e3)
                llm._engine._packer = llm._engine._runner = device
            compare(llm, arguments, args)


def compare(llm: LLM, arguments: dict[str, Any], args: argparse.Namespace) -> None:
    """Measure rounds without and with HTTP, alternately."""
    options = ServerOptions(served_model_name=("benchmark",), num_serve_frontends=args.frontends)
    host = EngineHost(llm, options.max_queue_size)
    configuration = json.dumps({"llm": arguments, "server": options.model_dump()}).encode()
    with socket.create_server(("127.0.0.1", 0)) as listening, Frontends(
        host, listening, configuration, args.frontends
    ) as frontends:  # fmt: skip
        frontends.start()
        for concurrency in args.concurrency:
            for _ in range(args.rounds):
                workload = requests(concurrency * args.requests_per_row, args.spread)
                here = in_process(llm, workload, concurrency)
                before = processor_seconds()
                there = over_http(listening.getsockname()[1], workload, concurrency, args.client_processes)
                used = {f"{name}_us_per_token": (after - before[name]) / tokens(workload) * 1e6
                        for name, after in processor_seconds().items()}  # fmt: skip
                print_record(concurrency=concurrency, requests=len(workload), in_process_tok_s=here, **there, **used,
                     kept=there["http_tok_s"] / here)  # fmt: skip
        host.close()


def processor_seconds() -> dict[str, float]:
    """Processor time so far, of the engine's process and of the frontends."""
    process = psutil.Process()
    spent = {"engine": sum(process.cpu_times()[:2])}
    frontends = [
        child for child in process.children() if any("serve.processes.frontend" in word for word in child.cmdline())
    ]
    return spent | {"frontends": sum(sum(child.cpu_times()[:2]) for child in frontends)}


def requests(count: int, spread: int) -> list[dict[str, Any]]:
    """Write requests in the form of `trtllm-bench prepare-dataset`."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, IDS, (count, INPUT)).tolist()
    lengths = rng.integers(OUTPUT - spread, OUTPUT + spread, count, endpoint=True).tolist()
    return [
        {"task_id": number, "input_ids": prompt, "output_tokens": length}
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def tokens(workload: Sequence[dict[str, Any]]) -> int:
    """Tokens that are to be generated."""
    return sum(request["output_tokens"] for request in workload)


def in_process(llm: LLM, workload: Sequence[dict[str, Any]], concurrency: int) -> float:
    """Generated tokens/s of the same requests without HTTP, each awaited as a whole."""

    async def run() -> None:
        room = asyncio.Semaphore(concurrency)

        async def one(request: dict[str, Any]) -> None:
            async with room:
                params = SamplingParams(temperature=1.0, max_tokens=request["output_tokens"], ignore_eos=True)
                await llm.generate_async(request["input_ids"], params)

        await asyncio.gather(*map(one, workload))

    began = time.perf_counter()
    asyncio.run(run())
    return tokens(workload) / (time.perf_counter() - began)


def over_http(port: int, workload: Sequence[dict[str, Any]], concurrency: int, processes: int) -> dict[str, float]:
    """Generated tokens/s and gaps by `trtllm-bench serve`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as dataset:
        dataset.writelines(json.dumps(request) + "\n" for request in workload)
        dataset.flush()
        command = [
            sys.executable, "-c", "from trtllm_jax.commands.bench.command import main; main()", "serve",
            f"--base_url=http://127.0.0.1:{port}/v1", f"--concurrency={concurrency}", f"--dataset={dataset.name}",
            "--ignore_eos", "--json_lines", f"--client_processes={processes}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    record = json.loads(done.stdout.splitlines()[-1])
    times = {
        f"{name}_{point}_ms": record[f"{name} (ms)"][point] for name in ("TTFT", "ITL") for point in ("p50", "p99")
    }
    return {"http_tok_s": record[OUTPUT_RATE], **times, "client_core_share": record["client_core_share"]}


def print_record(**figures: float) -> None:
    """Print one line of JSON."""
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
