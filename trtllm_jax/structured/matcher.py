"""Matchers that mask the tokens a constraint does not allow, over llguidance."""

import threading
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from checkpoints.error_text import one_line
from trtllm_jax.common.errors import RequestError
from trtllm_jax.engine.grammar import WORD_BITS, mask_words
from trtllm_jax.structured.sandbox import MAX_LEXER_STATES, SandboxedCompiler
from trtllm_jax.text.tokenizer import Tokenizer

FORBIDDEN = np.float32(-np.inf)


class LLGuidanceMatcher:
    """The state of one sequence's constraint."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    def restrict(self, logits: npt.NDArray[np.float32], original: npt.NDArray[np.float32]) -> None:
        """Set the logits [vocab] of tokens that the constraint does not allow to minus infinity, in place.

        If penalties and bans have forbidden all allowed tokens, these get their logits from `original`: the constraint
        has precedence. RequestError where the constraint allows no token.
        """
        allowed = self._allowed(logits.size)
        logits[~allowed] = FORBIDDEN
        if not (logits > FORBIDDEN).any():
            logits[allowed] = original[allowed]

    def accept(self, token: int) -> None:
        """Advance the state by a sampled token."""
        if not self._matcher.consume_token(token):
            raise self._failure()

    def copy(self) -> Self:
        """A matcher with the same state for another sequence; both share one lexer, so that copying is cheap."""
        return type(self)(self._matcher.deep_copy(), self._vocab)

    @staticmethod
    def allowed_words(matchers: Sequence[Any], vocab: int) -> tuple[npt.NDArray[np.int32], dict[int, Exception]]:
        """Bit masks of the ids that each matcher allows, int32 [n, mask_words(vocab)]; bit i of word j is id 32 j + i.

        Ids from `vocab` on are not allowed. A matcher that allows no token is reported with its index and an error, and
        its mask allows all tokens. Several masks are computed in parallel threads.
        """
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask, fill_next_token_bitmask_par

        masks = allocate_token_bitmask(len(matchers), max(matcher._vocab for matcher in matchers))
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0]._matcher, masks)
        else:
            fill_next_token_bitmask_par(
                _threads(), [(matcher._matcher, i) for i, matcher in enumerate(matchers)], masks
            )
        words = np.zeros((len(matchers), mask_words(vocab)), np.int32)
        width = min(words.shape[1], masks.shape[1])
        words[:, :width] = masks[:, :width]
        if vocab % WORD_BITS:
            words[:, -1] &= (1 << vocab % WORD_BITS) - 1
        failures: dict[int, Exception] = {
            i: matcher._failure()
            for i, matcher in enumerate(matchers)
            if matcher._matcher.is_error() or not words[i].any()
        }
        words[list(failures)] = -1
        return words, failures

    def _allowed(self, vocab: int) -> npt.NDArray[np.bool_]:
        words, failures = self.allowed_words([self], vocab)
        if failures:
            raise failures[0]
        return np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab].astype(np.bool_)

    def _failure(self) -> RequestError:
        reason = one_line(self._matcher.get_error().partition("<state>")[0], 300) or "no token can follow"
        return RequestError(f"SamplingParams.guided_decoding cannot be followed: {reason}")


@cache
def _threads() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


class GrammarCompiler:
    """Compiles constraints to matchers for one model; may be used from several threads.

    Args:
        tokenizer: the tokenizer of the model.
        vocab: the number of the model's token ids.
        end_ids: the ids that may follow a complete text, and end it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab = max(vocab, tokenizer.highest_id + 1)
        self._end_ids = sorted(end_ids)
        self._lock = threading.Lock()
        self._compiled_tokenizer: Any = None
        self._sandbox = SandboxedCompiler(self._vocab, tokenizer.special_tokens)

    def start(self, constraint: str) -> LLGuidanceMatcher:
        """A matcher at the start of a text. RequestError says what is wrong with the constraint."""
        from llguidance import LLMatcher, LLParserLimits

        tokenizer = self._llguidance_tokenizer()
        if not self._sandbox.compiles(constraint):
            raise RequestError(
                "SamplingParams.guided_decoding cannot be followed: it takes too long, too much memory or too deep a "
                "recursion to compile; simplify it"
            )
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES)
        invalid, messages = LLMatcher.validate_grammar_with_warnings(constraint, tokenizer, limits=limits)
        if invalid:
            raise RequestError(f"SamplingParams.guided_decoding cannot be followed: {one_line(messages[0], 300)}")
        matcher = LLGuidanceMatcher(LLMatcher(tokenizer, constraint, log_level=0, limits=limits), self._vocab)
        # llguidance checks some limits at the first token only; here, outside the engine's steps, it delays no one.
        matcher.restrict(np.zeros(self._vocab, np.float32), np.zeros(self._vocab, np.float32))
        return matcher

    def _llguidance_tokenizer(self) -> Any:
        """The tokenizer in llguidance's form, which takes about a second to build, and is built once."""
        from llguidance.hf import from_tokenizer

        if not self._end_ids:
            raise RequestError(
                "SamplingParams.guided_decoding needs a model with an end token, which ends a complete text; this "
                "one's generation_config.json and tokenizer name none"
            )
        with self._lock:
            if self._compiled_tokenizer is None:
                self._compiled_tokenizer = from_tokenizer(self._tokenizer.hf, self._vocab, self._end_ids)
            return self._compiled_tokenizer
