"""Prints `name==version` for the least version of every dependency that the tests need, as pyproject.toml states it.

With `--install` it prints what pip is to install instead: the project with the extras that the tests need.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

NEEDED = ("serve", "otel", "eval", "bench", "test", "docs")
"""The extras that tests need, beside the package's own dependencies."""


def floors() -> dict[str, Version]:
    """Of each dependency the least version on this Python. ValueError where one has none."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found: dict[str, Version] = {}
    for line in [*project["dependencies"], *(line for extra in NEEDED for line in extras[extra])]:
        stated = Requirement(line)
        if stated.marker is None or stated.marker.evaluate():
            found[stated.name] = max(_floor(stated), found.get(stated.name, Version("0")))
    return found


def _floor(stated: Requirement) -> Version:
    for specifier in stated.specifier:
        if specifier.operator in (">=", "=="):
            return Version(specifier.version)
    raise ValueError(f"pyproject.toml: {stated} states no least version; write {stated.name}>=version")


if __name__ == "__main__":
    lines = [f".[{','.join(NEEDED)}]"] if "--install" in sys.argv else [f"{n}=={v}" for n, v in floors().items()]
    print("\n".join(lines))
