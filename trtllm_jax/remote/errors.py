"""Failures that cross from the engine's process to those that wait: as a kind, and words."""

from trtllm_jax.common.errors import EngineBusyError, EngineDeadError, RequestError

_KINDS: dict[str, type[Exception]] = {
    "busy": EngineBusyError,
    "dead": EngineDeadError,
    "invalid": RequestError,
    "failed": RuntimeError,
}
"""The first that fits."""


def described(error: BaseException) -> tuple[str, str]:
    """A failure as it is sent."""
    kind = next((kind for kind, known in _KINDS.items() if isinstance(error, known)), "failed")
    return kind, str(error)


def as_exception(sent: tuple[str, str]) -> Exception:
    """What whoever waits for the sequence is told."""
    kind, message = sent
    return _KINDS[kind](message)
