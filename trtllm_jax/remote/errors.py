"""Exceptions as they are sent from the engine's process to a client's: a kind and a message."""

from trtllm_jax.common.errors import EngineBusyError, EngineDeadError, RequestError

_KINDS: dict[str, type[Exception]] = {
    "busy": EngineBusyError,
    "dead": EngineDeadError,
    "invalid": RequestError,
    "failed": RuntimeError,
}
"""The exception class of each kind; a failure is sent as the first kind whose class it is an instance of."""


def encode_error(error: BaseException) -> tuple[str, str]:
    """The kind and the message of a failure."""
    kind = next((kind for kind, known in _KINDS.items() if isinstance(error, known)), "failed")
    return kind, str(error)


def decode_error(encoded: tuple[str, str]) -> Exception:
    """The exception for a kind and a message of `encode_error`."""
    kind, message = encoded
    return _KINDS[kind](message)
