"""Failures as they cross from the engine's process to the requests': a kind and a message."""

from trtllm_jax.common.errors import EngineBusyError, EngineDeadError, RequestError

_KINDS: dict[str, type[Exception]] = {
    "busy": EngineBusyError,
    "dead": EngineDeadError,
    "invalid": RequestError,
    "failed": RuntimeError,
}
"""The first kind whose class fits a failure is the one that is sent."""


def encode_error(error: BaseException) -> tuple[str, str]:
    """The kind and the message of a failure."""
    kind = next((kind for kind, known in _KINDS.items() if isinstance(error, known)), "failed")
    return kind, str(error)


def decode_error(encoded: tuple[str, str]) -> Exception:
    """The exception for a kind and a message, which `encode_error` took from another one."""
    kind, message = encoded
    return _KINDS[kind](message)
