"""Interfaces of users' functions that change logits before a token is drawn."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from trtllm_jax.engine.logit_edits import Logits, Processor


class LogitsProcessor(ABC):
    """A user's function that changes the logits of one sequence; called for each token that it generates.

    A plain function with the same parameters may be given instead. It runs in the engine's thread and delays all
    requests.
    """

    @abstractmethod
    def __call__(
        self, req_id: int, logits: Logits, token_ids: list[list[int]], stream_ptr: int | None, client_id: int | None
    ) -> None:
        """Change `logits` [1, 1, vocab], float32 and not yet edited, in place.

        `token_ids` is a list of one list: the ids of the prompt and those generated so far. `stream_ptr` and
        `client_id` are None, because there is no CUDA stream to synchronise with.
        """


class BatchedLogitsProcessor(ABC):
    """Like `LogitsProcessor`, but called once a step, with one entry for each sequence that requests it."""

    @abstractmethod
    def __call__(
        self,
        req_ids: list[int],
        logits: list[Logits],
        token_ids: list[list[list[int]]],
        stream_ptr: int | None,
        client_ids: list[int | None],
    ) -> None:
        """Change each of `logits` [1, 1, vocab] in place."""


def as_processors(value: Any) -> tuple[Processor, ...]:
    """The processors in a user's `logits_processor`: None, a callable or a list of them. ValueError otherwise."""
    if value is None:
        return ()
    many = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(callable(each) and not isinstance(each, type) for each in many):
        raise ValueError(
            f"SamplingParams.logits_processor = {value!r} is invalid: give a function (req_id, logits, token_ids, "
            "stream_ptr, client_id), an object of a subclass of LogitsProcessor, or a list of them"
        )
    return many
