"""Failures that a caller may want to catch by name."""

import traceback


class RequestError(ValueError):
    """One request cannot be done as it is asked; others are not touched. TensorRT-LLM's name for it."""


class EngineDeadError(RuntimeError):
    """The engine ended by a failure, which is this error's cause; nothing it held can be completed."""


class EngineBusyError(RuntimeError):
    """The engine's queue is full: the request was not taken, and may be sent again later."""


def detached(failure: BaseException) -> Exception:
    """The failure without the frames that it was raised in, which hold steps and sequences; a note tells where it was.

    Its owner keeps it for as long as the result, and so would keep those. What is no `Exception`, such as SystemExit or
    a panic of a library in Rust, is told by one: it would end whoever waits.
    """
    told = failure if isinstance(failure, Exception) else RuntimeError(f"{failure!r} was raised for this request")
    where = "".join(traceback.format_tb(failure.__traceback__))
    if where and not isinstance(failure, RequestError):  # whose message says all
        told.add_note(f"Raised in the engine's process:\n{where}")
    told.__context__ = None
    return told.with_traceback(None)
