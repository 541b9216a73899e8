"""How one sequence's tokens are drawn, with nothing left open."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NucleusDecay:
    """A top-p that falls with every token and starts anew after a certain one (Lee et al. 2022, arXiv:2206.04624).

    Attributes:
        decay: factor for each token.
        least: top-p falls no further.
        reset_id: the token after which it starts anew; -1 for none.
    """

    decay: float
    least: float
    reset_id: int = -1

    def top_p(self, start: float, generated: Sequence[int]) -> float:
        """What applies to the token after `generated`."""
        since = len(generated)
        for back, token in enumerate(reversed(generated)):
            if token == self.reset_id:
                since = back
                break
        return max(start * self.decay**since, min(self.least, start))


@dataclass(frozen=True, slots=True)
class Sampling:
    """One row's sampling with nothing left open; where ``greedy``, the values that make sampling greedy too.

    ``temperature`` > 0; ``top_k`` 0 keeps all tokens; ``top_p`` in (0, 1]; ``min_p`` relative to the likeliest token,
    in [0, 1]; ``seed`` in [0, 2**64), None where the engine draws one. ``decay`` makes ``top_p`` fall, None for not.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    greedy: bool
    decay: NucleusDecay | None = None
