"""Compiles constraints in a sandbox, a child process with limits that may crash or hang in place of this one.

llguidance limits most of its work, but not every loop, nor the depth of its recursion, and no `except` catches a stack
overflow. A constraint that compiles on the sandbox's small stack also compiles on a thread's larger one. The child
process runs this file as a script, so the file imports nothing from the package.
"""

import hashlib
import json
import subprocess
import sys
import threading
from typing import Any

MAX_LEXER_STATES = 50_000
"""The lexer states that one constraint may have, of about 1 kB each."""

_MAX_CPU_SECONDS = 2
_MAX_SECONDS = 20
_MAX_BYTES = 4 << 30
_STACK_BYTES = 1 << 20
_MAX_CACHED = 4096


class SandboxedCompiler:
    """Compiles each constraint for one model once in a child process; may be used from several threads.

    Args:
        vocab: the number of token ids.
        special: the texts of the special tokens, which a grammar may name, by id.
    """

    def __init__(self, vocab: int, special: dict[int, str]) -> None:
        self._tokenizer = {"vocab": vocab, "special": [*special.items()]}
        self._results: dict[bytes, bool] = {}
        self._running = threading.BoundedSemaphore(4)

    def compiles(self, constraint: str) -> bool:
        """Whether compilation ends within the limits; the constraint may still be invalid."""
        key = hashlib.sha256(constraint.encode()).digest()
        cached = self._results.get(key)
        if cached is None:
            with self._running:
                cached = self._run(constraint)
            if len(self._results) >= _MAX_CACHED:
                self._results.clear()
            self._results[key] = cached
        return cached

    def _run(self, constraint: str) -> bool:
        try:
            done = subprocess.run(
                [sys.executable, "-P", __file__],
                input=json.dumps({"constraint": constraint, **self._tokenizer}).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_MAX_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        if b"started" not in done.stdout:
            raise RuntimeError(
                f"{sys.executable} could not be started to try the constraint of SamplingParams.guided_decoding: "
                f"it ended with {done.returncode}; it must be a Python with llguidance"
            )
        return b"compiled" in done.stdout


class _ByteTokenizer:
    """A vocabulary of single bytes and the model's special tokens, in the form of llguidance's `TokenizerWrapper`."""

    def __init__(self, vocab: int, special: list[tuple[int, str]]) -> None:
        named = dict(special)
        letters = (bytes([value]) for value in range(256))
        self.tokens = [named[i].encode() if i in named else next(letters, b"") for i in range(max(vocab, 512))]
        self.special_token_ids = sorted(named)
        self.eos_token_id = self.special_token_ids[0] if named else len(self.tokens) - 1
        self.bos_token_id = None

    def __call__(self, text: Any) -> list[int]:
        return []


def _compile(constraint: str, vocab: int, special: list[tuple[int, str]]) -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES)
    tokenizer = LLTokenizer(TokenizerWrapper(_ByteTokenizer(vocab, special)))
    print("started", flush=True)  # noqa: T201 -- the answer
    LLMatcher.validate_grammar(constraint, limits=limits)
    matcher = LLMatcher(tokenizer, constraint, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    print("compiled", flush=True)  # noqa: T201


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_SECONDS, _MAX_CPU_SECONDS))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_compile, kwargs=json.load(sys.stdin))
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
