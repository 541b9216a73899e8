"""A real server for the tests of a file."""

from collections.abc import Iterator

import pytest

from . import run
from .server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("soaked"), *run.OPTIONS) as server:
        yield server
    assert server.process.returncode == 0
