"""How `make docs` builds the site: the guides as they are, and the reference from the docstrings.

The source folder is the repository's root, so that the documents' links to each other and to README.md hold as written.
"""

import ast
import enum
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

import trtllm_jax
from trtllm_jax.common.strict_model import StrictModel
from trtllm_jax.models import gguf_architectures, supported

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "sharding", "checkpoints", "trtllm_jax")

project = "trtllm_jax"
version = release = trtllm_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**"]
exclude_patterns = [".*", "build", "dist"]

# Links to headings are checked as links to files are.
myst_heading_anchors = 3
default_role = "code"
napoleon_numpy_docstring = False
# An attribute of a record is described once, even where the class has it too; its type stands in the signature.
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "alabaster"
html_title = f"trtllm_jax {release}"
html_copy_source = False
html_show_copyright = html_show_sphinx = False
# index.html leads to root_doc, which is a folder down.
html_extra_path = ["start_page"]
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px", "fixed_sidebar": True}


def setup(app: Sphinx) -> None:
    """Connects what is particular to the package's records."""
    app.connect("autodoc-process-signature", fields_as_signature)
    app.connect("autodoc-process-docstring", prose_as_restructured_text, priority=400)  # before napoleon reads it
    app.connect("autodoc-process-docstring", add_limits)
    app.connect("autodoc-skip-member", skip_or_show)
    app.connect("source-read", list_modules)
    app.connect("source-read", list_architectures)
    app.connect("source-read", list_files)


def list_modules(app: Sphinx, page: str, source: list[str]) -> None:
    """A line `.. modules:: package` stands for an entry of each public module of the package, so none is forgotten."""
    source[0] = re.sub(
        r"^\.\. modules:: ([\w.]+)$", lambda line: _module_entries(line[1]), source[0], flags=re.MULTILINE
    )


def list_files(app: Sphinx, page: str, source: list[str]) -> None:
    """A line `.. files::` stands for every file of the packages, with the sentence that it begins with."""
    if ".. files::" in source[0]:
        source[0] = source[0].replace(".. files::", "\n".join(map(_files_of, PACKAGES)))


def _files_of(package: str) -> str:
    lines = [package, "-" * len(package), ""]
    for path in sorted((ROOT / package).rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines.append(f"- ``{path.relative_to(ROOT)}``: {_escaped(text.split(chr(10) * 2)[0])}")
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    """A docstring's first sentence as restructured text, in one line."""
    lines = [text.replace("\n", " ")]
    prose_as_restructured_text(None, "module", "", None, None, lines)  # type: ignore[arg-type]
    return lines[0]


def list_architectures(app: Sphinx, page: str, source: list[str]) -> None:
    """A line `.. architectures::` stands for a table of the architectures that the package finds."""
    source[0] = re.sub(r"^\.\. architectures::$", lambda _: _architecture_table(), source[0], flags=re.MULTILINE)


def _architecture_table() -> str:
    gguf = {known.model_class: f"``{known.name}``" for known in gguf_architectures()}
    rows = [("Name in config.json", "Name in GGUF", "Models")]
    rows += [(f"``{name}``", gguf.get(name, "none"), models) for name, models in sorted(supported().items())]
    cells = ("\n     - ".join(row) for row in rows)
    return ".. list-table::\n   :header-rows: 1\n\n" + "\n".join(f"   * - {row}" for row in cells)


def _module_entries(package: str) -> str:
    found = pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
    names = sorted(module.name for module in found if not module.name.startswith(f"{package}._"))
    return "\n".join(f"{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n   :members:\n" for name in names)


def prose_as_restructured_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose with code in backticks: nothing else in them is markup, and letters may follow the code."""
    text = re.split(r"``([^`]+)``|`([^`]+)`", "\n".join(lines))
    for at in range(0, len(text), 3):
        text[at] = re.sub(r"([*|]|_(?!\w))", r"\\\1", text[at])
    for at in range(1, len(text), 3):
        code, before, after = text[at] or text[at + 1], text[at - 1], text[at + 2]
        text[at] = "\\ " * before[-1:].isalnum() + f"``{code}``" + "\\ " * after[:1].isalnum()
        text[at + 1] = ""
    lines[:] = "".join(text).split("\n")
    # In its first line napoleon takes what precedes a colon for a type: an empty comment has none.
    if what == "property":
        lines[:0] = ["..", ""]


def fields_as_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A record's fields with plain types: pydantic's bounds would be unreadable, and errors state them."""
    if _is_record(obj):
        plain, fields = typing.get_type_hints(obj), inspect.signature(obj).parameters.values()
        shown = inspect.Signature([field.replace(annotation=plain[field.name]) for field in fields])
        signature, returns = stringify_signature(shown, unqualified_typehints=True), None
    # What stands for a mutable default is no Python, and would not be parsed.
    return signature and signature.replace("<factory>", "..."), returns


def add_limits(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The arguments that a record refuses or ignores, from the lists that do so."""
    if not _is_record(obj):
        return
    if obj._unavailable:
        unavailable = sorted(obj._unavailable.items())
        values = (f"`{name}` (`{' or '.join(map(_shown, neutral))}`)" for name, neutral in unavailable)
        lines += [f"Refused in this release with any other value: {', '.join(values)}.", ""]
    if obj._ignored:
        lines += [f"Accepted without effect: {', '.join(f'`{name}`' for name in sorted(obj._ignored))}.", ""]


def skip_or_show(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Values of enumerations are shown; a tuple's fields stand in its signature, and pydantic's settings nowhere."""
    if isinstance(obj, enum.Enum):
        return False
    settings = name == "model_config" and isinstance(obj, dict)
    return True if settings or type(obj).__name__ == "_tuplegetter" else None


def _is_record(obj: Any) -> bool:
    return inspect.isclass(obj) and issubclass(obj, StrictModel)


def _shown(value: object) -> str:
    return repr(str(value)) if isinstance(value, str) else repr(value)
