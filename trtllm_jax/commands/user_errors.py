"""How the commands show what a user can mend."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def readable_errors() -> Iterator[None]:
    """What a user can mend is one line without a traceback; the log levels from VERBOSE on show all of it."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        if os.environ.get("TRTLLM_LOG_LEVEL", "").upper() in ("VERBOSE", "DEBUG", "TRACE"):
            raise
        raise click.ClickException(str(error)) from error
