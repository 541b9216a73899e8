"""Exceptions that callers may catch by name."""

import traceback


class RequestError(ValueError):
    """One request is invalid; others are not affected. The name is TensorRT-LLM's."""


class EngineDeadError(RuntimeError):
    """The engine ended with a failure, which is this error's cause; its requests cannot be completed."""


class EngineBusyError(RuntimeError):
    """The engine's queue is full: the request was not accepted, and may be sent again later."""


def detached(failure: BaseException) -> Exception:
    """The failure without its traceback, whose frames refer to steps and sequences; a note has the traceback's text.

    A result keeps its failure, and would keep those frames alive with it. A failure that is no `Exception`, such as
    SystemExit or a panic of a Rust library, becomes a RuntimeError, because raising it would end the waiting thread.
    """
    reported = failure if isinstance(failure, Exception) else RuntimeError(f"{failure!r} was raised for this request")
    where = "".join(traceback.format_tb(failure.__traceback__))
    if where and not isinstance(failure, RequestError):  # a RequestError's message is enough
        reported.add_note(f"Raised in the engine's process:\n{where}")
    reported.__context__ = None
    return reported.with_traceback(None)
