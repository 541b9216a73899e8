"""Failures that a caller may want to catch by name."""


class RequestError(ValueError):
    """One request cannot be done as it is asked; others are not touched. TensorRT-LLM's name for it."""


class EngineDeadError(RuntimeError):
    """The engine ended by a failure, which is this error's cause; nothing it held can be completed."""


class EngineBusyError(RuntimeError):
    """The engine's queue is full: the request was not taken, and may be sent again later."""
