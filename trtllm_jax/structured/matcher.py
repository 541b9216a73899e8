"""What keeps a sequence to its constraint, token by token; over llguidance."""

import threading
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from checkpoints.shown import one_line
from trtllm_jax.common.errors import RequestError
from trtllm_jax.engine.grammar import WORD_BITS, mask_words
from trtllm_jax.structured.trial import MAX_LEXER_STATES, Trials
from trtllm_jax.text.tokenizer import Tokenizer

NEVER = np.float32(-np.inf)


class LLGuidanceMatcher:
    """One sequence's place in its constraint."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    def restrict(self, logits: npt.NDArray[np.float32], original: npt.NDArray[np.float32]) -> None:
        """Forbid in `logits` [vocab] every token that the text cannot go on with.

        Where penalties and bans have left none of the others, these are as in `original`: the constraint wins.
        RequestError where there are none at all.
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

    @staticmethod
    def allowed_words(matchers: Sequence[Any], vocab: int) -> tuple[npt.NDArray[np.int32], dict[int, Exception]]:
        """For each matcher which ids it allows, int32 [n, mask_words(vocab)]; bit i of word j is id 32 j + i.

        Ids from `vocab` on are not allowed. Matchers that no token can follow are reported by their index, and allow
        everything. Several are computed at once, in threads.
        """
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

        known = allocate_token_bitmask(len(matchers), max(matcher._vocab for matcher in matchers))
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0]._matcher, known)
        else:
            fill_next_token_bitmask_par(
                _threads(), [(matcher._matcher, i) for i, matcher in enumerate(matchers)], known
            )
        words = np.zeros((len(matchers), mask_words(vocab)), np.int32)
        width = min(words.shape[1], known.shape[1])
        words[:, :width] = known[:, :width]
        if vocab % WORD_BITS:
            words[:, -1] &= (1 << vocab % WORD_BITS) - 1
        failures: dict[int, Exception] = {
            i: matcher._failure()
            for i, matcher in enumerate(matchers)
            if matcher._matcher.is_error() or not words[i].any()
        }
        words[list(failures)] = -1
        return words, failures

    def _allowed(self, size: int) -> npt.NDArray[np.bool_]:
        words, failures = self.allowed_words([self], size)
        if failures:
            raise failures[0]
        return np.unpackbits(words.view(np.uint8), bitorder="little")[:size].astype(np.bool_)

    def _failure(self) -> RequestError:
        reason = one_line(self._matcher.get_error().partition("<state>")[0], 300) or "no token can follow"
        return RequestError(f"SamplingParams.guided_decoding cannot be followed: {reason}")


@cache
def _threads() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


class GrammarCompiler:
    """Makes matchers for one model; may be used from several threads.

    Args:
        tokenizer: of the model.
        vocab: its ids are 0 to vocab - 1.
        end_ids: what may follow a complete text, and ends it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab = max(vocab, tokenizer.highest_id + 1)
        self._end_ids = sorted(end_ids)
        self._lock = threading.Lock()
        self._words: Any = None
        self._trials = Trials(self._vocab, tokenizer.special_tokens)

    def start(self, constraint: str) -> LLGuidanceMatcher:
        """A matcher at a text's beginning. RequestError says what is wrong with the constraint."""
        from llguidance import LLMatcher, LLParserLimits

        words = self._known_words()
        if not self._trials.safe(constraint):
            raise RequestError(
                "SamplingParams.guided_decoding cannot be followed: it takes too long, too much memory or too deep a "
                "recursion to compile; simplify it"
            )
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(constraint, words, limits=limits)
        if wrong:
            raise RequestError(f"SamplingParams.guided_decoding cannot be followed: {one_line(messages[0], 300)}")
        matcher = LLGuidanceMatcher(LLMatcher(words, constraint, log_level=0, limits=limits), self._vocab)
        # Some limits are noticed at the first token only: here that holds up nobody else.
        matcher.restrict(np.zeros(self._vocab, np.float32), np.zeros(self._vocab, np.float32))
        return matcher

    def _known_words(self) -> Any:
        """The vocabulary as llguidance wants it, which takes about a second to make."""
        from llguidance.hf import from_tokenizer

        if not self._end_ids:
            raise RequestError(
                "SamplingParams.guided_decoding needs a model with an end token, which ends a complete text; this "
                "one's generation_config.json and tokenizer name none"
            )
        with self._lock:
            if self._words is None:
                self._words = from_tokenizer(self._tokenizer.hf, self._vocab, self._end_ids)
            return self._words
