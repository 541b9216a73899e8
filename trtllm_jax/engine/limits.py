"""Sizes that bound one step, and when a waiting sequence is admitted."""

import enum
from dataclasses import dataclass


class CapacityPolicy(enum.StrEnum):
    """When a waiting sequence is admitted (TensorRT-LLM's CapacitySchedulerPolicy)."""

    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    """Once the pages for its prompt and all its new tokens are reserved: it is never preempted."""
    MAX_UTILIZATION = "MAX_UTILIZATION"
    """Once there are pages for its prompt; the newest sequence is preempted and recomputed when pages run out."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that bound one step.

    Attributes:
        max_batch_size: sequences that run at once.
        max_num_tokens: tokens of one ragged step; at least max_batch_size, so that every row can decode.
        max_seq_len: tokens of a sequence.
        max_decode_steps: iterations of one decode dispatch.
        max_tokens_per_iteration: tokens that a row may gain in one iteration; it gains one at least.
        fixed_decode_steps: whether a decode dispatch has one iteration or `max_decode_steps`, and nothing between,
            because a program whose loop must not look at its data has a fixed number of them.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_decode_steps: int
    max_tokens_per_iteration: int = 1
    fixed_decode_steps: bool = False

    @property
    def max_decode_tokens(self) -> int:
        """Tokens that a row may gain in one decode dispatch."""
        return self.max_decode_steps * self.max_tokens_per_iteration

    def rows_of_width(self, width: int) -> int:
        """The most sequences, padded to a width, that a step of whole sequences has: one at least."""
        return min(self.max_batch_size, max(1, self.max_num_tokens // width))

    @property
    def max_step_tokens(self) -> int:
        """The most positions of a sequence between the first and the last that a dispatch may write.

        It is the most tokens that any dispatch computes, and in addition the difference between the most and the fewest
        tokens that the one in flight may have gained.
        """
        return max(self.max_num_tokens, self.max_decode_tokens) + self.max_decode_tokens - self.max_decode_steps
