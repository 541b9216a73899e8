"""How the commands show errors that a user can fix."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def readable_errors() -> Iterator[None]:
    """A context in which ValueError and MemoryError are shown on one line; log level VERBOSE shows the traceback."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        if os.environ.get("TRTLLM_LOG_LEVEL", "").upper() in ("VERBOSE", "DEBUG", "TRACE"):
            raise
        raise click.ClickException(str(error)) from error
