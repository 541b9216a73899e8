"""Fixtures of the commands' tests."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .scripted_server import ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.close()


def write_lines(file: Path, *rows: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def choice(query: str, *choices: str, gold: int = 0) -> dict[str, Any]:
    return {"query": query, "choices": list(choices), "gold": gold}


@pytest.fixture(scope="session")
def eval_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file for each task, in the forms that docs/evaluation.md describes."""
    folder = tmp_path_factory.mktemp("eval_files")
    arc = [choice(f"Question: What is {i} and one?", f"{i}", f"{i + 1}, we say", "ten", gold=1) for i in range(4)]
    write_lines(folder / "arc_easy.jsonl", *arc)
    write_lines(folder / "arc_challenge.jsonl", *arc[:3])
    boolq = [choice(f"Passage: Ice is cold ({i}).\nQuestion: is ice cold?", "no", "yes", gold=1) for i in range(3)]
    write_lines(folder / "boolq.jsonl", *boolq)
    write_lines(
        folder / "openbook_qa.jsonl", choice("A dog", "barks", "flies"), choice("Rain is", "dry", "wet", gold=1)
    )
    piqa = [choice(f"Question: How to open box {i}?\n", "Lift the lid.", "Sing.") for i in range(3)]
    write_lines(folder / "piqa.jsonl", *piqa)
    options = ["Ann met Sue and Ann", "Ann met Sue and Sue"]
    write_lines(
        folder / "winogrande.jsonl", *({"context_options": options, "continuation": "left.", "gold": i} for i in (0, 1))
    )
    lambada = [{"context": f"A cat, {i} cats, a", "continuation": "cat"} for i in range(3)]
    write_lines(folder / "lambada_openai.jsonl", *lambada)
    gsm = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(4)]
    write_lines(folder / "gsm8k_test.jsonl", *gsm)
    (folder / "wikitext2_test.txt").write_text(
        " \n = One = \n \n Some @-@ thing is here . \n \n = = Part = = \n \n More of it , and more . \n"
        " \n = Two words = \n \n Another page of text . \n"
    )
    for split, count in (("test", 3), ("dev", 2)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "virology"):
            with (folder / "mmlu" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                rows.writerows([f"{subject} {split}, {i}?", "one", "two, or", "three", "four", i] for i in range(count))
    return folder
