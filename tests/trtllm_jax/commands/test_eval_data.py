"""The files of tasks: both forms, what lm-eval makes of them, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trtllm_jax.commands.eval.data import SOURCES, available_tasks, local_tasks, pages


def only(name: str, folder: Path) -> Any:
    return local_tasks([name], folder)["tasks"][name]


def question(task: Any, index: int = 0) -> tuple[str, Any, Any]:
    """lm-eval's prompt, choices and answer of one item."""
    row = list(task.test_docs())[index]
    choices = task.doc_to_choice(row) if task.config.output_type == "multiple_choice" else None
    return task.doc_to_text(row), choices, task.doc_to_target(row)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arc_easy", ("Question: What is 0 and one?\nAnswer:", ["0", "1, we say", "ten"], 1)),
        ("boolq", ("Ice is cold (0).\nQuestion: is ice cold?\nAnswer:", ["no", "yes"], 1)),
        ("openbookqa", ("A dog", ["barks", "flies"], 0)),
        ("piqa", ("Question: How to open box 0?\nAnswer:", ["Lift the lid.", "Sing."], 0)),
        ("winogrande", (0, ["Ann met Sue and Ann", "Ann met Sue and Sue"], "left.")),
        ("lambada_openai", ("A cat, 0 cats, a", None, " cat")),
        ("gsm8k", ("Question: What is 0 + 1?\nAnswer:", None, "It is 1.\n#### 1")),
        ("mmlu_virology", ("virology test, 0?\nA. one\nB. two, or\nC. three\nD. four\nAnswer:", list("ABCD"), 0)),
        ("wikitext", ("", None, " = One =\n\nSome-thing is here.\n\n== Part ==\n\nMore of it, and more.\n\n")),
    ],
)
def test_lm_evals_own_prompts(name: str, expected: tuple[Any, ...], eval_files: Path) -> None:
    assert question(only(name, eval_files)) == expected


def test_rows_as_the_hub_has_them(tmp_path: Path) -> None:
    row = {"id": "x", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    (tmp_path / "arc_challenge.jsonl").write_text(json.dumps(row) + "\n\n")
    assert question(only("arc_challenge", tmp_path)) == ("Question: Why?\nAnswer:", ["a", "b"], 1)


def test_groups_and_examples(eval_files: Path, tmp_path: Path) -> None:
    tasks = local_tasks(["mmlu", "piqa"], eval_files)
    assert set(tasks["tasks"]) == {"mmlu_anatomy", "mmlu_virology", "piqa"}
    assert list(tasks["groups"]) == ["mmlu"]
    # MMLU's examples are its dev file's, in order; another task's are its other items.
    anatomy, piqa = tasks["tasks"]["mmlu_anatomy"], tasks["tasks"]["piqa"]
    shown = anatomy.fewshot_context(next(iter(anatomy.test_docs())), num_fewshot=2)
    assert shown.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nanatomy dev, 0?"
    )
    assert "\nAnswer: A\n\nanatomy dev, 1?" in shown
    for item in piqa.test_docs():
        assert piqa.fewshot_context(item, num_fewshot=2).count(item["goal"]) == 1
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "Asked?", "answer": "#### 1"}\n')
    (tmp_path / "gsm8k_train.jsonl").write_text('{"question": "Shown?", "answer": "#### 2"}\n')
    task = only("gsm8k", tmp_path)
    asked = task.fewshot_context(next(iter(task.test_docs())), num_fewshot=1)
    assert asked == "Question: Shown?\nAnswer: #### 2\n\nQuestion: Asked?\nAnswer:"


def test_pages_are_cut_at_their_headings() -> None:
    text = " \n = One = \n \n a = b \n = = Part = = \n x \n \n = Two of = it = \n y \n"
    assert [page.split("\n")[0] for page in pages(text)] == [" = One = ", " = Two of = it = "]
    assert pages("plain") == ["plain"]


def test_tasks_that_are_there(eval_files: Path, tmp_path: Path) -> None:
    assert set(available_tasks(eval_files)) == {*SOURCES, "mmlu"}
    assert available_tasks(eval_files / "mmlu") == ["mmlu"]
    (tmp_path / "piqa.jsonl").touch()
    assert available_tasks(tmp_path) == ["piqa"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("hellaswag", None, "", "task 'hellaswag' is unknown with --dataset_path: use arc_easy, arc_challenge"),
        ("mmlu", None, "", "has no MMLU: put its files at mmlu/test/<subject>_test.csv"),
        ("piqa", None, "", "piqa.jsonl is missing"),
        ("piqa", "piqa.jsonl", "", "piqa.jsonl has no rows to evaluate"),
        ("piqa", "piqa.jsonl", "{", "piqa.jsonl, line 1 is not JSON"),
        (
            "piqa",
            "piqa.jsonl",
            "[1]",
            "piqa.jsonl, row 1 lacks a field: it needs goal, sol1, sol2, label or query",
        ),
        ("piqa", "piqa.jsonl", '{"query": "a", "choices": ["b"], "gold": 0}', "piqa.jsonl, row 1 is invalid"),
        (
            "arc_easy",
            "arc_easy.jsonl",
            '{"query": "a", "choices": ["b"], "gold": 7}',
            "arc_easy.jsonl, row 1 is invalid",
        ),
        (
            "winogrande",
            "winogrande.jsonl",
            '{"context_options": ["a_b c", "a_b d"], "continuation": "e", "gold": 0}',
            "has '_'",
        ),
    ],
)
def test_what_is_wrong_is_named(name: str, file: str | None, content: str, message: str, tmp_path: Path) -> None:
    if file is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        local_tasks([name], tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"piqa\.jsonl is not UTF-8 text"):
        local_tasks(["piqa"], tmp_path)
