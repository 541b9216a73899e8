"""Turns errors of the tokenizer libraries into ValueError."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.error_text import one_line


def is_failure(error: BaseException) -> bool:
    """Whether the error is the library's failure, and not an interrupt or the end of the program.

    The libraries raise Exception itself among others, and if their Rust code panics a BaseException without a public
    name.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def as_value_error(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Failures become a ValueError "path problem: ... remedy"; one that already starts with `path` is unchanged."""
    try:
        yield
    except BaseException as error:
        if not is_failure(error) or (isinstance(error, ValueError) and str(error).startswith(str(path))):
            raise
        failure = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} {problem}: {failure}. {remedy}") from error
