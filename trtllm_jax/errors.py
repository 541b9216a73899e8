"""Failures that a caller may want to catch by name."""

import traceback
from typing import TypeVar

Failure = TypeVar("Failure", bound=BaseException)


class RequestError(ValueError):
    """One request cannot be done as it is asked; others are not touched. TensorRT-LLM's name for it."""


class EngineDeadError(RuntimeError):
    """The engine ended by a failure, which is this error's cause; nothing it held can be completed."""


class EngineBusyError(RuntimeError):
    """The engine's queue is full: the request was not taken, and may be sent again later."""


def detached(failure: Failure) -> Failure:
    """The failure without the frames that it was raised in, which hold steps and sequences; a note tells where it was.

    Its owner keeps it for as long as the result, and so would keep those.
    """
    where = "".join(traceback.format_tb(failure.__traceback__))
    if where and not isinstance(failure, RequestError):  # whose message says all
        failure.add_note(f"Raised in the engine's process:\n{where}")
    failure.__context__ = None
    return failure.with_traceback(None)
