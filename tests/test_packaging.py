"""What is installed: one wheel of four packages with their data, and an import that costs little."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "sharding", "checkpoints", "trtllm_jax")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIST_INFO = f"trtllm_jax-{PROJECT['version']}.dist-info"


def applies_here(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.iterdir()
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {*PACKAGES, DIST_INFO}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_file_of_a_package(wheel: zipfile.ZipFile, package: str) -> None:
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert in_wheel == on_disk
    assert {f"{package}/__init__.py", f"{package}/py.typed"} <= in_wheel


def test_the_wheel_states_its_licence_and_python(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert wheel.read(f"{DIST_INFO}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("package", PACKAGES)
def test_git_ignores_no_source_file(package: str) -> None:
    """A habitual `checkpoints/` line in .gitignore would lose a package silently."""
    command = [
        "git",
        "-c",
        "core.excludesFile=",
        "check-ignore",
        "--no-index",
        f"{package}/__init__.py",
        f"{package}/a/b.json",
    ]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ignored.returncode, ignored.stdout) == (1, ""), ignored.stderr


def test_importing_trtllm_jax_imports_no_heavy_library() -> None:
    code = "import sys, json, trtllm_jax; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True))
    assert "trtllm_jax" in loaded
    assert not {"jax", "jaxlib", "flax", "transformers", "torch"} & set(loaded)


def test_a_data_folder_of_the_same_name_does_not_hide_a_package(tmp_path: Path) -> None:
    """Training scripts run beside a folder named `checkpoints`, which Python would take for a namespace package."""
    (tmp_path / "checkpoints").mkdir()
    code = "import checkpoints; print(checkpoints.__file__)"
    imported = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    assert Path(imported.strip()).parent.name == "checkpoints"
    assert not Path(imported.strip()).is_relative_to(tmp_path)


def test_every_dependency_is_pinned_at_a_version_it_admits() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for pin in filter(applies_here, map(Requirement, (line for line in lines if not line.startswith("#")))):
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        pins[canonicalize_name(pin.name)] = Version(exact.version)
    extras = PROJECT["optional-dependencies"]
    asked_for = [*PROJECT["dependencies"], *extras["test"], *extras["docs"], *extras["dev"]]
    for requirement in filter(applies_here, map(Requirement, asked_for)):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
