"""What changes a model's logits before a token is drawn, in numpy: penalties, bans, bias, and users' own functions.

The device applies most of it, as lists that equal `LogitEdits.apply` (`engine.edit_list`). Users' functions run on the
host, and so does the rest of what their sequences ask for.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Processor = Callable[[int, Logits, list[list[int]], int | None, int | None], object]

NEVER = np.float32(-np.inf)

INVALID = "the changed logits hold NaN or +inf; check the logits processors, embedding_bias and the penalties"
NOTHING_LEFT = (
    "no token is left to draw: every logit is -inf; check the logits processors, embedding_bias, bad and bad_token_ids"
)
"""What is wrong where changed logits cannot be drawn from."""


@dataclass(frozen=True, eq=False)
class LogitEdits:
    """One sequence's changes to its logits; the defaults change nothing.

    Attributes:
        processors: users' functions, called first, in order.
        batched: whether the engine's `BatchedLogitsProcessor` is called, before those.
        bias: float32 [vocab], added; None for none.
        repetition: divides the positive logits of tokens that occurred, prompt included, and multiplies the negative
            ones (Keskar et al. 2019, arXiv:1909.05858).
        presence: subtracted from the logits of tokens that occurred.
        frequency: subtracted for every time that a token occurred.
        ignored_prompt: tokens at the prompt's beginning that presence and frequency do not count.
        min_tokens: new tokens before which no id of `ends` is drawn.
        ends: ids that end the sequence.
        no_repeat_ngram: tokens of the shortest sequence that may not occur twice, prompt included; 0 for none.
        bad: sequences of ids that may not be generated, whatever is left then.
        constraint: what the text must be, in llguidance's form; a `GrammarMatcher` applies it last.
    """

    processors: tuple[Processor, ...] = ()
    batched: bool = False
    bias: npt.NDArray[np.float32] | None = None
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    ignored_prompt: int = 0
    min_tokens: int = 0
    ends: frozenset[int] = frozenset()
    no_repeat_ngram: int = 0
    bad: tuple[tuple[int, ...], ...] = ()
    constraint: str | None = None

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens occurred."""
        return self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0

    @cached_property
    def biased(self) -> npt.NDArray[np.int32]:
        """The ids whose bias is not zero."""
        return np.flatnonzero([] if self.bias is None else self.bias).astype(np.int32)

    def most_entries(self, total: int) -> int:
        """A bound on how many logits change after `total` tokens, once for each kind of change; users' own not."""
        of_all = total * (self.penalises + (self.no_repeat_ngram > 0))
        return of_all + self.biased.size + len(self.bad) + len(self.ends)

    def apply(self, logits: Logits, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Change `logits` [vocab] in place, all but the users' functions: those are the caller's to call before.

        Penalties come first and bans last, as in transformers. Where the ban of `ends`, or of repeated n-grams, would
        leave no token, that ban is not made.
        """
        if self.bias is not None:
            logits += self.bias
        self._penalise(logits, prompt, generated)
        bad, ends, repeating = self.bans(prompt, generated)
        logits[_within(logits, bad)] = NEVER
        _ban_unless_all(logits, ends)
        _ban_unless_all(logits, repeating)

    def bans(
        self, prompt: Sequence[int], generated: Sequence[int]
    ) -> tuple[Collection[int], Collection[int], Collection[int]]:
        """Ids that may not follow: bad ones, ends that come too early, and what would repeat an n-gram."""
        bad = self._bad_next([*prompt, *generated]) if self.bad else ()
        ends = self.ends if len(generated) < self.min_tokens else ()
        return bad, ends, self._repeating([*prompt, *generated]) if self.no_repeat_ngram else ()

    def _penalise(self, logits: Logits, prompt: Sequence[int], generated: Sequence[int]) -> None:
        if self.repetition != 1.0:
            seen = np.unique(np.array([*prompt, *generated], np.int64))
            scores = logits[seen]
            # An extreme penalty leaves infinities, which fail the request by name where they are looked for.
            with np.errstate(all="ignore"):
                logits[seen] = np.where(scores > 0, scores / self.repetition, scores * self.repetition)
        if self.presence or self.frequency:
            counted = np.array([*prompt[self.ignored_prompt :], *generated], np.int64)
            seen, counts = np.unique(counted, return_counts=True)
            logits[seen] -= self.presence + self.frequency * counts

    def _bad_next(self, tokens: list[int]) -> set[int]:
        """Ids that would complete a bad sequence, which may begin in the prompt."""
        return {last for *before, last in self.bad if not before or tokens[-len(before) :] == before}

    def _repeating(self, tokens: list[int]) -> set[int]:
        """Ids that would complete an n-gram for the second time."""
        size = self.no_repeat_ngram
        if not 0 < size <= len(tokens):
            return set()
        tail = tokens[len(tokens) - size + 1 :]
        if not tail:
            return set(tokens)
        # Looked for by its last id, which is quick in a long sequence; where the sequence ends nothing follows.
        found, end = set(), size - 2
        with contextlib.suppress(ValueError):
            while True:
                end = tokens.index(tail[-1], end, len(tokens) - 1) + 1
                if tokens[end - size + 1 : end] == tail:
                    found.add(tokens[end])
        return found


def _within(logits: Logits, ids: Collection[int]) -> list[int]:
    """The ids that the model has: a tokenizer, or a user's stop ids, may know others."""
    return [token for token in ids if token < logits.size]


def _ban_unless_all(logits: Logits, ids: Collection[int]) -> None:
    banned = _within(logits, ids)
    kept = logits[banned]
    logits[banned] = NEVER
    if banned and not (logits > NEVER).any():
        logits[banned] = kept


def top_logprobs(logits: Logits, count: int, token: int | None = None) -> tuple[list[tuple[int, float]], float, int]:
    """The `count` likeliest ids at a position with logits [vocab], best first, with their log-probabilities.

    Of equally likely ones the lowest ids, lowest first, as the device reports them.
    Then the log-probability and the rank (1 is best) of `token`; NaN and 0 for None.
    """
    wide = logits.astype(np.float64)
    highest = wide.max()
    scores = wide - (highest + np.log(np.exp(wide - highest).sum()))
    count = min(count, scores.size)
    best = np.zeros(0, np.int64)
    if count:
        least = np.partition(scores, -count)[-count]
        above = np.flatnonzero(scores > least)
        best = np.append(above, np.flatnonzero(scores == least)[: count - above.size])
        best = best[np.argsort(-scores[best], kind="stable")]
    top = [(int(index), float(scores[index])) for index in best]
    if token is None:
        return top, float("nan"), 0
    return top, float(scores[token]), 1 + int((scores > scores[token]).sum())
