"""How the commands show errors that a user can fix."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def readable_errors() -> Iterator[None]:
    """A context in which errors that a user can fix are shown on one line; log level VERBOSE shows the traceback.

    They are ValueError, MemoryError and too few devices.
    """
    try:
        yield
    except (ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            from sharding import DeviceCountError  # what could raise it has imported it, and jax

            if not isinstance(error, DeviceCountError):
                raise
        if os.environ.get("TRTLLM_LOG_LEVEL", "").upper() in ("VERBOSE", "DEBUG", "TRACE"):
            raise
        raise click.ClickException(str(error)) from error
