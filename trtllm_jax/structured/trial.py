"""Whether a constraint can be compiled at all, found out in a process that may crash, hang or grow in our place.

llguidance limits most of its work, but not the depth of its recursion, whose overflow no `except` catches, nor every
loop. What a trial survives with a small stack is safe in threads with a usual one. The file is also what the process
runs, alone, so it imports nothing of the package.
"""

import hashlib
import json
import subprocess
import sys
import threading
from typing import Any

MAX_LEXER_STATES = 50_000
"""Of one request, about 1 kB each."""

_PROCESSOR_SECONDS = 2
_SECONDS = 20
_BYTES = 4 << 30
_STACK_BYTES = 1 << 20
_REMEMBERED = 4096


class Trials:
    """Tries constraints for one model, each once; may be used from several threads.

    Args:
        vocab: ids are 0 to vocab - 1.
        special: the texts of special tokens, which a grammar may name, by id.
    """

    def __init__(self, vocab: int, special: dict[int, str]) -> None:
        self._words = {"vocab": vocab, "special": [*special.items()]}
        self._safe: dict[bytes, bool] = {}
        self._running = threading.BoundedSemaphore(4)

    def safe(self, constraint: str) -> bool:
        """Whether compiling it ends soon, whatever comes of it."""
        key = hashlib.sha256(constraint.encode()).digest()
        known = self._safe.get(key)
        if known is None:
            with self._running:
                known = self._try(constraint)
            if len(self._safe) >= _REMEMBERED:
                self._safe.clear()
            self._safe[key] = known
        return known

    def _try(self, constraint: str) -> bool:
        try:
            done = subprocess.run(
                [sys.executable, "-P", __file__],
                input=json.dumps({"constraint": constraint, **self._words}).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_SECONDS,
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


class _Words:
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
    words = LLTokenizer(TokenizerWrapper(_Words(vocab, special)))
    print("started", flush=True)  # noqa: T201 -- the answer
    LLMatcher.validate_grammar(constraint, limits=limits)
    matcher = LLMatcher(words, constraint, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    print("compiled", flush=True)  # noqa: T201


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_SECONDS, _PROCESSOR_SECONDS))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_compile, kwargs=json.load(sys.stdin))
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
