"""The site that `make docs` builds: no warning, every public name with its docstring, nothing from the network."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import zlib
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, get_origin

import pytest

ROOT = Path(__file__).parents[1]
EXPORTING = (
    "trtllm_jax", "trtllm_jax.llmapi", "sharding", "pallas_kernels.attention", "pallas_kernels.matmul",
    "pallas_kernels.norm", "pallas_kernels.sampling",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Warnings are errors: links that lead nowhere, pages outside the index, modules that cannot be imported."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--fresh-env", "--fail-on-warning", "-c", ROOT / "docs"]
    command = [sys.executable, "-m", "sphinx", *options, ROOT, folder]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def indexed(site: Path) -> set[str]:
    """Every Python name that has an entry; the file is four lines of text, then compressed lines."""
    entries = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    return set(re.findall(r"^(\S+) py:\w+ ", entries, re.MULTILINE))


def public_objects() -> dict[Any, set[str]]:
    """Public functions and classes, with the names under which each may be described."""
    names = [(module, name) for module in EXPORTING for name in importlib.import_module(module).__all__]
    for path in sorted((ROOT / "checkpoints").glob("[!_]*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                names.append((f"checkpoints.{path.stem}", node.name))
    found: dict[Any, set[str]] = defaultdict(set)
    for module, name in names:
        thing = getattr(importlib.import_module(module), name)
        if callable(thing) and get_origin(thing) is None:
            found[thing] |= {f"{module}.{name}", f"{thing.__module__}.{thing.__qualname__}"}
    return found


@pytest.mark.slow
def test_every_public_name_is_described(site: Path) -> None:
    """autodoc leaves out what has no docstring, so an entry is a description too."""
    described = indexed(site)
    objects = public_objects()
    assert len(objects) > 80
    missing = [sorted(names) for names in objects.values() if not names & described]
    for thing, names in objects.items():
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            method = isinstance(value, FunctionType | property | cached_property | classmethod | staticmethod)
            if method and not member.startswith("_") and not {f"{name}.{member}" for name in names} & described:
                missing.append([f"{name}.{member}" for name in sorted(names)])
    assert missing == []


@pytest.mark.slow
def test_records_tell_what_is_refused(site: Path) -> None:
    page = (site / "docs" / "reference" / "llm_api.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert re.search(r"Refused in this release with any other value:.* use_beam_search \(False\)", text)


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    loading = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]*")
    assert [found for page in pages for found in loading.findall(page.read_text())] == []


@pytest.mark.slow
def test_the_first_page_leads_to_the_index(site: Path) -> None:
    (target,) = re.findall(r'url=([^"]+)"', (site / "index.html").read_text())
    assert "quickstart.html" in (site / target).read_text()
