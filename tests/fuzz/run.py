"""`make fuzz`: coverage-guided fuzzing of every reader of a checkpoint's files, by atheris (libFuzzer).

    python tests/fuzz/run.py [--runs 100000] [--seed 1]

Each kind of file runs in a process of its own, which may take 1 GiB more than it starts with. An input that breaks a
reader is kept in build/fuzz, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "fuzz"
MEMORY = 1 << 30
LARGEST_INPUT = 1 << 14
SECONDS_A_RUN = 10  # after which libFuzzer ends a run that hangs


class Kind(NamedTuple):
    """A file that is fuzzed: its name, the reader and mutation by name, its part of all runs, the files beside it."""

    file: str
    read: str
    seeds: str
    mutate: str
    share: float
    beside: tuple[tuple[str, str], ...] = ()


_WITH_TOKENIZER = (("tokenizer.json", "tokenizers"),)
KINDS = (
    Kind("model.safetensors", "read_safetensors", "safetensors", "mutate_safetensors", 0.2),
    Kind(
        "model.safetensors.index.json",
        "read_index",
        "indexes",
        "mutate_json",
        0.1,
        (("one.safetensors", "safetensors"),),
    ),
    Kind("model.gguf", "read_gguf", "ggufs", "mutate_gguf", 0.25),
    Kind("model.bin", "read_llama2c", "llama2c", "mutate_gguf", 0.05),
    Kind("tokenizer.bin", "read_llama2c_tokenizer", "llama2c_tokenizers", "mutate_gguf", 0.05),
    Kind("config.json", "read_config", "configs", "mutate_json", 0.2),
    Kind("tokenizer.json", "read_tokenizer", "tokenizers", "mutate_json", 0.1, (("config.json", "configs"),)),
    Kind("tokenizer_config.json", "read_tokenizer", "tokenizer_configs", "mutate_json", 0.05, _WITH_TOKENIZER),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs in all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=[kind.file for kind in KINDS], help="only this kind of file, in this process")
    options = parser.parse_args()
    if options.kind:
        fuzz(next(kind for kind in KINDS if kind.file == options.kind), options.runs, options.seed)
    failed = []
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind.file, "--seed", str(options.seed)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0"}
        runs = str(round(kind.share * options.runs))
        told = None if sys.stderr.isatty() else subprocess.PIPE  # libFuzzer's progress
        done = subprocess.run([*command, "--runs", runs], env=environment, cwd=ROOT, stderr=told)
        if done.returncode:
            failed.append(kind.file)
            sys.stderr.write((done.stderr or b"").decode(errors="replace")[-5000:])
    sys.exit(f"broken readers: {', '.join(failed)}; the inputs are in {KEPT.relative_to(ROOT)}" if failed else 0)


def fuzz(kind: Kind, runs: int, seed: int) -> None:
    """Fuzz one kind of file in this process, and end the process."""
    import atheris
    import mutation
    import seeds

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-corpus-"))
    valid: list[bytes] = getattr(seeds, kind.seeds)()
    for number, content in enumerate(valid):
        (corpus / str(number)).write_bytes(content)
    for name, source in kind.beside:
        (folder / name).write_bytes(getattr(seeds, source)()[0])
    with atheris.instrument_imports(include=["checkpoints", "trtllm_jax.models", "trtllm_jax.nn.rope"]):
        import targets

        read = getattr(targets, kind.read)
        (folder / kind.file).write_bytes(valid[0])
        read(folder, valid[0])  # imports the rest
    change: Callable[[bytes, random.Random], bytes] = getattr(mutation, kind.mutate)
    done = accepted = 0
    started = time.perf_counter()

    def one(content: bytes) -> None:
        nonlocal done, accepted
        accepted += targets.run(read, folder, kind.file, content)
        done += 1
        if done == runs:
            took = time.perf_counter() - started
            print(f"{kind.file}: {done} inputs in {took:.0f} s, {accepted} accepted, none broke the reader", flush=True)
            os._exit(0)

    def mutate(content: bytes, largest: int, draw: int) -> bytes:
        rng = random.Random(draw)
        if rng.random() < 0.5:
            return atheris.Mutate(content, largest)
        if rng.random() < 0.3:
            content = rng.choice(valid)
        for _ in range(rng.choice((1, 1, 2, 4))):
            content = change(content, rng)
        return content[:largest]

    KEPT.mkdir(parents=True, exist_ok=True)
    grown = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (grown, grown))
    limits = [f"-max_len={LARGEST_INPUT}", f"-timeout={SECONDS_A_RUN}", "-rss_limit_mb=0", f"-seed={seed}"]
    quiet = [] if sys.stderr.isatty() else ["-verbosity=0"]
    kept = f"-artifact_prefix={KEPT}/{kind.file}-"
    atheris.Setup([sys.argv[0], *limits, *quiet, kept, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
