"""The errors of the tokenizer libraries as ValueError."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_panic(error: BaseException) -> bool:
    """Whether the Rust half of a library gave up: a BaseException of no public name, after which all else is well."""
    return type(error).__name__ == "PanicException"


@contextmanager
def as_value_error(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """A ValueError that names `path` passes; any other failure of the block becomes "path problem: failure. remedy"."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        failure = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} {problem}: {failure:.500}. {remedy}") from error
