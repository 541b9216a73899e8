from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite(f"{__package__}.suite")

from .tiny import TinyModel  # noqa: E402


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tiny" in metafunc.fixturenames:
        names = metafunc.cls.served if "engine" in metafunc.fixturenames else metafunc.cls.configs
        metafunc.parametrize("tiny", names, indirect=True, scope="class")


@pytest.fixture(scope="class")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The tiny model of one of the class's configurations."""
    return TinyModel(request.cls.configs[request.param], tmp_path_factory.mktemp("tiny"))
