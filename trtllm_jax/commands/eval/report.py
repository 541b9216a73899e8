"""Reports an evaluation: a table, and a JSON file in lm-eval's form."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 120
"""Columns if the output is not a terminal."""

SECTIONS = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
"""The parts of lm-eval's results to keep: everything but the samples and the tasks' definitions."""


def record(results: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The `SECTIONS` of lm-eval's results, and the evaluation's settings as "config"."""
    return {name: results[name] for name in SECTIONS if name in results} | {"config": config}


def write_record(path: Path, found: dict[str, Any]) -> None:
    """Write the record to a JSON file."""
    path.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


def print_table(found: dict[str, Any]) -> None:
    """Print a table with one row for each metric; a group precedes its members."""
    config = found["config"]
    table = Table(title=f"{Path(config['model']).name}: {config['seconds']:.1f} s", title_justify="left")
    for name in ("task", "items", "shots", "filter", "metric", "value", "± stderr"):
        table.add_column(name, justify="right" if name in ("items", "shots", "value", "± stderr") else "left")
    for name, values in found["results"].items():
        for metric, better in found["higher_is_better"].get(name, {}).items():
            for key in (key for key in values if key.split(",")[0] == metric):
                kind = key.split(",")[1]
                table.add_row(
                    values.get("alias", name),
                    _items(found, name),
                    str(found["n-shot"].get(name, "")),
                    "" if kind == "none" else kind,
                    f"{metric} {'' if better is None else '↑' if better else '↓'}".rstrip(),
                    _number(values[key]),
                    _number(values.get(f"{metric}_stderr,{kind}")),
                )
    Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False).print(table)


def _items(found: dict[str, Any], name: str) -> str:
    counts = found["n-samples"]
    members = [name] if name in counts else found.get("group_subtasks", {}).get(name, [])
    return str(sum(counts[member]["effective"] for member in members if member in counts))


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float | int) else ""
