"""What keeps a sequence to its constraint, token by token; over llguidance."""

import threading
from collections.abc import Collection
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from checkpoints.shown import one_line
from trtllm_jax.constraint_trial import MAX_LEXER_STATES, Trials
from trtllm_jax.tokenizer import Tokenizer

NEVER = np.float32(-np.inf)


class Guide:
    """One sequence's place in its constraint."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    def restrict(self, logits: npt.NDArray[np.float32], original: npt.NDArray[np.float32]) -> None:
        """Forbid in `logits` [vocab] every token that the text cannot go on with.

        Where penalties and bans have left none of the others, these are as in `original`: the constraint wins.
        ValueError where there are none at all.
        """
        allowed = self._allowed(logits.size)
        logits[~allowed] = NEVER
        if not (logits > NEVER).any():
            logits[allowed] = original[allowed]

    def accept(self, token: int) -> None:
        """The token was drawn."""
        if not self._matcher.consume_token(token):
            raise self._failure()

    def copy(self) -> Self:
        """Another sequence at the same place, which costs nothing: both go on to build one lexer."""
        return type(self)(self._matcher.deep_copy(), self._vocab)

    def _allowed(self, size: int) -> npt.NDArray[np.bool_]:
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(1, self._vocab)
        fill_next_token_bitmask(self._matcher, bits)
        if self._matcher.is_error():
            raise self._failure()
        allowed = np.zeros(size, np.bool_)
        known = np.unpackbits(bits.view(np.uint8), bitorder="little")[: min(size, self._vocab)]
        allowed[: known.size] = known
        return allowed

    def _failure(self) -> ValueError:
        reason = one_line(self._matcher.get_error().partition("<state>")[0], 300) or "no token can follow"
        return ValueError(f"SamplingParams.guided_decoding cannot be followed: {reason}")


class Guides:
    """Makes guides for one model; may be used from several threads.

    Args:
        tokenizer: of the model.
        vocab: its ids are 0 to vocab - 1.
        end_ids: what may follow a complete text, and ends it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab = max(vocab, tokenizer.vocab_size)
        self._end_ids = sorted(token for token in end_ids if token < vocab)
        self._lock = threading.Lock()
        self._words: Any = None
        self._trials = Trials(self._vocab, _special(tokenizer))

    def start(self, constraint: str) -> Guide:
        """A guide at a text's beginning. ValueError says what is wrong with the constraint."""
        from llguidance import LLMatcher, LLParserLimits

        words = self._known_words()
        if not self._trials.safe(constraint):
            raise ValueError(
                "SamplingParams.guided_decoding cannot be followed: it takes too long, too much memory or too deep a "
                "recursion to compile; simplify it"
            )
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(constraint, words, limits=limits)
        if wrong:
            raise ValueError(f"SamplingParams.guided_decoding cannot be followed: {one_line(messages[0], 300)}")
        guide = Guide(LLMatcher(words, constraint, log_level=0, limits=limits), self._vocab)
        # Some limits are noticed at the first token only: here that holds up nobody else.
        guide.restrict(np.zeros(self._vocab, np.float32), np.zeros(self._vocab, np.float32))
        return guide

    def _known_words(self) -> Any:
        """The vocabulary as llguidance wants it, which takes about a second to make."""
        from llguidance.hf import from_tokenizer

        if not self._end_ids:
            raise ValueError(
                "SamplingParams.guided_decoding needs a model with an end token, which ends a complete text; this "
                "one's generation_config.json and tokenizer name none"
            )
        with self._lock:
            if self._words is None:
                self._words = from_tokenizer(self._tokenizer.hf, self._vocab, self._end_ids)
            return self._words


def _special(tokenizer: Tokenizer) -> dict[int, str]:
    added = getattr(tokenizer.hf, "added_tokens_decoder", {})
    return {token: word.content for token, word in added.items() if word.special}
