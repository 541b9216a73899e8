"""Failures of an engine that a caller may want to catch by name."""


class EngineDeadError(RuntimeError):
    """The engine ended by a failure, which is this error's cause; nothing it held can be completed."""


class EngineBusyError(RuntimeError):
    """The engine's queue is full: the request was not taken, and may be sent again later."""
