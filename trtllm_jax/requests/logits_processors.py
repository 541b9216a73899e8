"""Users' own changes to logits before a token is drawn."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from trtllm_jax.engine.logit_edits import Logits, Processor


class LogitsProcessor(ABC):
    """A user's change to the logits of one sequence, called for each of its tokens.

    A plain function with the same parameters does as well. It runs in the engine's thread: everyone waits for it.
    """

    @abstractmethod
    def __call__(
        self, req_id: int, logits: Logits, token_ids: list[list[int]], stream_ptr: int | None, client_id: int | None
    ) -> None:
        """Change `logits` [1, 1, vocab], the model's own in float32, in place.

        `token_ids` [[...]] are the prompt's and what was generated so far. `stream_ptr` and `client_id` are None: there
        is no stream to order with.
        """


class BatchedLogitsProcessor(ABC):
    """As `LogitsProcessor`, called once a step with lists: an entry for each sequence that asks for it."""

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
    """What a user gave as `logits_processor`: None, a callable or a list of them."""
    if value is None:
        return ()
    many = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(callable(each) and not isinstance(each, type) for each in many):
        raise ValueError(
            f"SamplingParams.logits_processor = {value!r} is invalid: give a function (req_id, logits, token_ids, "
            "stream_ptr, client_id), an object of a subclass of LogitsProcessor, or a list of them"
        )
    return many
