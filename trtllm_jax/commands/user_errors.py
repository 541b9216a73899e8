"""How the commands show errors that a user can fix."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def readable_errors() -> Iterator[None]:
    """A context in which a user's error becomes one line; the log levels from VERBOSE on show the traceback."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        if os.environ.get("TRTLLM_LOG_LEVEL", "").upper() in ("VERBOSE", "DEBUG", "TRACE"):
            raise
        raise click.ClickException(str(error)) from error
