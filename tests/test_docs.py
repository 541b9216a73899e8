"""The documents are true: their Python runs, and everything that they name exists."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, cast

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "sharding", "checkpoints", "trtllm_jax")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HOST = re.compile(r"\b(?:[a-z0-9-]+\.)+(?:com|org|net|io|co|dev|ai|local|internal)\b|\b\d+\.\d+\.\d+\.\d+\b")
KNOWN_HOSTS = {"keepachangelog.com", "semver.org"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|mnt|var|opt|usr|data|Users)/|\b[A-Z]:\\")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def code_of(text: str) -> str:
    """The fenced blocks and the code spans."""
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return "\n".join([*(code for _, code in FENCE.findall(text)), *spans])


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def defined_names() -> Iterator[str]:
    """`Class`, `Class.method` and `module.function` of every source file."""
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                yield f"{path.stem}.{node.name}"
            elif isinstance(node, ast.ClassDef):
                yield node.name
                yield from (f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef))


def python_blocks(name: str) -> Iterator[tuple[str, CodeType]]:
    """The section and the code of every Python block of a document, with its own line numbers."""
    text = (ROOT / name).read_text()
    for block in FENCE.finditer(text):
        if block[1] == "python":
            title = re.findall(r"^## (.*)$", text[: block.start()], re.MULTILINE)[-1]
            yield title, compile("\n" * text.count("\n", 0, block.start(2)) + block[2], ROOT / name, "exec")


def shut_down_all(names: dict[str, Any]) -> None:
    from trtllm_jax import LLM

    for value in names.values():
        if isinstance(value, LLM):
            value.shutdown()


def run_guide(name: str, names: dict[str, Any], before: dict[str, list[str]]) -> None:
    """Runs a guide, and others before the sections that `before` names; what is shown after a block is printed."""
    text = (ROOT / "docs" / name).read_text()
    blocks = [block for block in FENCE.finditer(text) if block[1] == "python"]
    for block, (title, code) in zip(blocks, python_blocks(f"docs/{name}"), strict=True):
        for other in before.pop(title, []):
            run_guide(other, names, {})
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if shown := SHOWN.match(text, block.end()):
            assert printed.getvalue() == shown[1], f"{name}, {title}"
    assert not before, f"{name} has no sections of Python named {list(before)}"


@pytest.mark.usefixtures("smollm2_gguf")
def test_python_of_readme_and_its_guides_runs_as_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtllm_jax.engine.kv_cache.CPU_POOL_BYTES", 256 << 20)  # a fast test, in little memory
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for title, code in python_blocks("README.md"):
            if title == "Configuration":  # which ends the model that the guides go on with
                for guide in ("docs/chat.md", "docs/guided.md", "docs/logits.md"):
                    for _, block in python_blocks(guide):
                        exec(block, names)
            exec(code, names)
    finally:
        shut_down_all(names)
    assert capsys.readouterr().out.startswith(" Paris.")


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.usefixtures("smollm2_gguf")
def test_guides_run_and_print_what_they_show() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    # The next section of the quick start ends the model that the others use.
    others = ["sampling.md", "evaluation.md", "streaming.md", "serving.md", "errors.md"]
    level = logging.getLogger("trtllm_jax").level
    try:
        run_guide("quickstart.md", names, before={"Configure": others})
    finally:
        logging.getLogger("trtllm_jax").setLevel(level)
        shut_down_all(names)


def test_readme_names_every_document() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", section(README, "Guides")))
    assert linked == {path.relative_to(ROOT).as_posix() for path in DOCUMENTS if path.parent.name == "docs"}


def test_the_table_of_models_has_every_architecture() -> None:
    from trtllm_jax.models import gguf_architectures, supported

    rows = re.findall(r"^\| .*? \| (.*?) \| (.*?) \|", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE)[1:]
    listed, of_gguf = (sorted(re.findall(r"`([\w-]+)`", "\n".join(column))) for column in zip(*rows, strict=True))
    assert listed == sorted(supported())
    assert of_gguf == sorted(architecture.name for architecture in gguf_architectures())


def test_readme_lists_the_sampling_parameters_that_do_something() -> None:
    from trtllm_jax import SamplingParams

    rows = re.findall(r"^\| (`.*?) \|", section(README, "Sampling parameters"), re.MULTILINE)
    listed = re.findall(r"`(\w+)`", "\n".join(rows))
    without_effect = {"pad_id", "length_penalty", "spaces_between_special_tokens"}
    available = SamplingParams.model_fields.keys() - SamplingParams._unavailable.keys() - without_effect
    assert sorted(listed) == ["SamplingParams", *sorted(available)]


def test_readme_names_only_options_that_are_refused() -> None:
    from trtllm_jax.llmapi.llm_args import KvCacheConfig, LlmArgs
    from trtllm_jax.requests.sampling_params import SamplingParams

    raising = section(README, "Limits of this release").split("Not available are:\n")[1].split("\n\n")[0]
    refused = {*SamplingParams._unavailable, *LlmArgs._unavailable, *KvCacheConfig._unavailable}
    named = re.findall(r"`(\w+)`", raising)
    assert named
    assert refused.issuperset(named)


def test_readme_lists_the_gguf_types() -> None:
    from checkpoints import gguf_source

    (line,) = re.findall(r"^- GGUF files.*", README, re.MULTILINE)
    readable = {kind.name for kind in (*gguf_source._PLAIN, *gguf_source._QUANTISED)}
    assert set(re.findall(r"\b(?:B?F\d+|Q\d_\w)\b", line)) == readable


@pytest.mark.slow
def test_research_python_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    document = ROOT / "docs" / "research.md"
    text, names = document.read_text(), {"__name__": "__main__"}
    for block in FENCE.finditer(text):
        if block[1] == "python":
            exec(compile("\n" * text.count("\n", 0, block.start(2)) + block[2], document, "exec"), names)
    assert capsys.readouterr().out.startswith("(4, 32, 100) float32\n")


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_gguf")
def test_notebook_prints_what_it_shows() -> None:
    """Every code cell, run in order, writes the output that is stored with it."""
    path = ROOT / "examples" / "generate.ipynb"
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        assert cell["execution_count"] == number
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
        assert printed.getvalue() == shown


def test_every_file_begins_with_a_sentence() -> None:
    """The documentation's list of files is made of these."""
    for path in sources():
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text, f"{path} does not say what it has"
        first = text.split("\n\n")[0].replace("\n", " ")
        assert first.endswith((".", ":", "?", "!")), f"{path}: {first!r} is no sentence"


def test_identifiers_use_the_terms_of_the_field() -> None:
    """Words that this code once used in place of the field's: report, request, setting, run, return."""
    retired = re.compile(r"(?:^|_)(tells?|told|hears?|heard|wish|wishes|obeys?|brought|brings?|whoever)(?:_|$)", re.I)
    found = set()
    for path in [*sources(), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            for field in ("id", "arg", "attr", "name"):
                name = getattr(node, field, None)
                if isinstance(name, str) and retired.search(name):
                    found.add((path.relative_to(ROOT).as_posix(), name))
    assert found == set()


def test_architecture_describes_every_room() -> None:
    rooms = section(ARCHITECTURE, "Rooms")
    packages = [path.parent.relative_to(ROOT).as_posix() for path in sources() if path.name == "__init__.py"]
    top = [name for name in packages if name.count("/") == (1 if name.startswith("trtllm_jax/") else 0)]
    assert {name for name in top if f"`{name}/`" not in rooms} - {"trtllm_jax"} == set()


def test_axis_letters_are_in_the_glossary() -> None:
    known = re.findall(r"^\| ([a-z](?:, [a-z])*) \|", section(ARCHITECTURE, "Axis letters"), re.MULTILINE)
    letters = {letter for row in known for letter in row.split(", ")}
    used = set()
    for path in sources():
        for listed in re.findall(r"Axes(?: in the signatures)?:\s(.*?)\.(?:\s|$)", path.read_text(), re.DOTALL):
            used |= set(re.findall(r"(?:^|,\s+)([a-z]) ", listed))
    assert len(used) > 8
    assert used <= letters


def test_architecture_shows_the_table_of_programs() -> None:
    from trtllm_jax.engine.program_table import ENCODE_FAMILIES, FAMILIES

    shown = re.findall(r"^\| `(\w+)` \| (.+) \|$", section(ARCHITECTURE, "Programs"), re.MULTILINE)
    assert shown == [(family.name, family.runs) for family in (*FAMILIES, *ENCODE_FAMILIES)]


def test_decisions_count_the_programs() -> None:
    from types import ModuleType, SimpleNamespace

    from pallas_kernels.devices import Platform
    from trtllm_jax.engine.config import backend_defaults
    from trtllm_jax.engine.limits import SchedulerLimits
    from trtllm_jax.engine.program_table import Sizes, programs
    from trtllm_jax.nn.cache_group import CacheGroup, KeysAndValues
    from trtllm_jax.nn.execution import Execution
    from trtllm_jax.nn.model import Model

    counts = []
    for platform in (Platform("cpu"), Platform("gpu")):
        chosen = backend_defaults(platform)
        limits = SchedulerLimits(chosen.max_batch_size, chosen.max_num_tokens, 512, chosen.max_decode_steps)
        module = SimpleNamespace(cache_spec=lambda config: (CacheGroup((0,), KeysAndValues(1, 8)),))
        model = Model(cast(ModuleType, module), SimpleNamespace(vocab=1000), execution=Execution(platform))
        sizes = Sizes(model, limits, page_size=32, table_widths=(16,), new_pages=1)
        counts.append(str(len(programs(sizes))))
    decisions = (ROOT / "docs" / "decisions.md").read_text()
    assert re.findall(r"(\d+) on a CPU with default sizes, (\d+) on a GPU", decisions) == [tuple(counts)]


def test_architecture_names_functions_that_exist() -> None:
    code = re.findall(r"`([A-Za-z_.]+)`", section(ARCHITECTURE, "A request's way"))
    named = {name for name in code if "." in name or name[0].isupper()} - {"LLM"}
    assert len(named) > 20
    assert named <= set(defined_names())


def test_what_is_said_to_be_in_a_file_is_there() -> None:
    """A row that names files names functions, classes and tables of these files, and nothing else."""
    rows = re.findall(r"^\| [^|]*\| (.+) \|$", section(ARCHITECTURE, "Where things are"), re.MULTILINE)
    checked = 0
    for code in (re.findall(r"`([^`]+)`", row) for row in rows):
        bases = (ROOT, ROOT / "trtllm_jax")
        paths = [base / name for name in code if "/" in name for base in bases if (base / name).exists()]
        assert len(paths) == sum("/" in name for name in code), code
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
        text = "".join(file.read_text() for file in files)
        names = [name for name in code if "/" not in name and files]
        assert [name for name in names if not re.search(rf"(def|class) {name}\b|^ *{name}\b.* =", text, re.M)] == []
        checked += len(names)
    assert checked > 20


@each_document
def test_named_python_files_exist(document: Path) -> None:
    named = set(re.findall(r"[\w./-]+\.py\b", code_of(document.read_text())))
    assert {name for name in named if not any((base / name).is_file() for base in (ROOT, ROOT / "trtllm_jax"))} == set()


@each_document
def test_make_commands_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code_of(document.read_text()))) <= targets


def test_readme_names_the_commands_of_a_fresh_clone() -> None:
    assert {"make demo", "make test"} <= set(re.findall(r"^make [a-z]+", code_of(README), re.MULTILINE))


@each_document
def test_extras_exist(document: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install [^\n]*\.\[(\w+)\]", code_of(document.read_text()))) <= set(extras)


@each_document
def test_relative_links_resolve(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    relative = [link for link in links if "://" not in link]
    assert [link for link in relative if not (document.parent / link).exists()] == []


@each_document
def test_no_machine_is_named(document: Path) -> None:
    text = document.read_text()
    assert set(HOST.findall(text)) <= KNOWN_HOSTS
    assert MACHINE_PATH.findall(text) == []


def test_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
