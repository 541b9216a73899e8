"""What the engine asks of whatever keeps a sequence to a grammar; `trtllm_jax.structured` has the implementation."""

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

WORD_BITS = 32


def mask_words(vocab: int) -> int:
    """32-bit words that say of each id whether it may be drawn."""
    return -(-vocab // WORD_BITS)


class GrammarMatcher(Protocol):
    """One sequence's place in its grammar; all matchers of an engine are of one class."""

    def restrict(self, logits: npt.NDArray[np.float32], original: npt.NDArray[np.float32]) -> None:
        """Forbid in `logits` [vocab] every token that the text cannot go on with.

        Where penalties and bans have left none of the others, these are as in `original`: the grammar wins.
        RequestError where there are none at all.
        """

    def accept(self, token: int) -> None:
        """The token was drawn. RequestError where the grammar does not allow it."""

    def copy(self) -> Self:
        """Another sequence at the same place."""
        ...

    @staticmethod
    def allowed_words(
        matchers: Sequence["GrammarMatcher"], vocab: int
    ) -> tuple[npt.NDArray[np.int32], dict[int, Exception]]:
        """For each matcher which ids it allows, int32 [n, mask_words(vocab)]; bit i of word j is id 32 j + i.

        Matchers that no token can follow are reported by their index, and allow everything.
        """
        ...
