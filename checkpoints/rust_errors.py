"""The errors of the tokenizer libraries as ValueError."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.error_text import one_line


def is_failure(error: BaseException) -> bool:
    """Whether the library failed, rather than that someone ends the program.

    They raise many kinds, plain Exception among them; where their Rust half panics, a BaseException of no public name.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def as_value_error(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """A ValueError that starts with `path`, as ours do, passes; other failures become "path problem: ... remedy"."""
    try:
        yield
    except BaseException as error:
        if not is_failure(error) or (isinstance(error, ValueError) and str(error).startswith(str(path))):
            raise
        failure = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} {problem}: {failure}. {remedy}") from error
