"""The package's logger, its one start-up line, and progress bars that only a terminal sees."""

import logging
import os
import sys
from typing import Protocol, Self

LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
    "DEBUG": logging.DEBUG,
    "TRACE": logging.DEBUG,
}
"""What TRTLLM_LOG_LEVEL may say; TensorRT-LLM also treats its three most talkative levels as one."""

logger = logging.getLogger("trtllm_jax")


class ProgressBar(Protocol):
    """The part of a tqdm bar that callers use: ``n`` units done of ``total``, which may become known later."""

    n: float
    total: float | None

    def update(self, n: float = 1) -> object:
        """Moves the bar by ``n`` units."""

    def close(self) -> None:
        """Ends the bar's line."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> object: ...


class _StderrHandler(logging.Handler):
    """Writes to stderr, and leaves records to the application once it has configured logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            sys.stderr.write(f"{self.format(record)}\n")


def set_level(name: str) -> None:
    """Makes the logger as talkative as ``name``, one of LEVELS in any case; ValueError names the choices."""
    level = LEVELS.get(name.strip().upper())
    if level is None:
        raise ValueError(f"log level = {name!r} is unknown: use one of {', '.join(LEVELS)}")
    logger.setLevel(level)


def configure(environment: str | None) -> None:
    """Attaches the handler once and applies TRTLLM_LOG_LEVEL; WARNING where it is unset or (with a warning) unknown."""
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(name)s] [%(levelname)s] %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    if environment:
        try:
            set_level(environment)
        except ValueError as error:
            logger.warning("TRTLLM_LOG_LEVEL is ignored: %s", error)


def status(message: str) -> None:
    """Says ``message`` to whoever watches: a log record at INFO, else a plain line when stderr is a terminal."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    elif sys.stderr.isatty():
        sys.stderr.write(f"{message}\n")


def progress(total: float | None, desc: str, unit: str = "it", unit_scale: bool = False) -> ProgressBar:
    """A tqdm bar on stderr, silent unless that is a terminal; a context manager with ``update(n)`` and ``close()``."""
    from tqdm import tqdm

    # disable=None is tqdm's own "only on a terminal".
    bar: ProgressBar = tqdm(total=total, desc=desc, unit=unit, unit_scale=unit_scale, file=sys.stderr, disable=None)
    return bar


configure(os.environ.get("TRTLLM_LOG_LEVEL"))
