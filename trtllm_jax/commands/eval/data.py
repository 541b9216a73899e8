"""lm-eval's tasks over local files: the name of each file, and how its rows are converted to lm-eval's form."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MMLU = "mmlu"
TITLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)
"""WikiText's heading of a page; section headings have more equals signs."""


@dataclass(frozen=True)
class Source:
    """Where a task's rows are.

    Attributes:
        file: its name in the folder.
        home: the folder of the task's definition, under lm-eval's `tasks`.
        fields: of a row in the form that lm-eval's task reads (the hub's data set).
        short: of a row in the short form.
        convert: from the short form to `fields`.
        examples: a file of few-shot examples; without it they are other rows of `file`.
    """

    file: str
    home: str
    fields: tuple[str, ...]
    short: tuple[str, ...] = ()
    convert: Callable[[Row], Row] | None = None
    examples: str | None = None


def _with_letters(row: Row) -> Row:
    choices = list(row["choices"])
    labels = list(LETTERS[: len(choices)])
    return {"choices": {"text": choices, "label": labels}, "answerKey": labels[row["gold"]]}


def _arc(row: Row) -> Row:
    return {"question": row["query"].removeprefix("Question: ")} | _with_letters(row)


def _openbook(row: Row) -> Row:
    return {"question_stem": row["query"]} | _with_letters(row)


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def _boolq(row: Row) -> Row:
    passage, question = row["query"].removeprefix("Passage: ").rsplit("\nQuestion: ", 1)
    return {"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]}


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]
    shared = commonprefix([first, second])  # noqa: RUF071 of characters
    if "_" in shared:
        raise ValueError(f"{shared!r} has '_', which marks the gap in lm-eval's form")
    return {
        "sentence": f"{shared}_ {row['continuation']}",
        "option1": first[len(shared) :],
        "option2": second[len(shared) :],
        "answer": str(row["gold"] + 1),
    }


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation']}"}


def _mmlu(row: Row) -> Row:
    return {
        "question": row["question"],
        "choices": [row[f"choice{i}"] for i in range(4)],
        "answer": int(row["answer"]),
    }


_CHOICE = ("query", "choices", "gold")
SOURCES = {
    "arc_easy": Source("arc_easy.jsonl", "arc", ("question", "choices", "answerKey"), _CHOICE, _arc),
    "arc_challenge": Source("arc_challenge.jsonl", "arc", ("question", "choices", "answerKey"), _CHOICE, _arc),
    "boolq": Source("boolq.jsonl", "super_glue/boolq", ("passage", "question", "label"), _CHOICE, _boolq),
    "gsm8k": Source("gsm8k_test.jsonl", "gsm8k", ("question", "answer"), examples="gsm8k_train.jsonl"),
    "lambada_openai": Source("lambada_openai.jsonl", "lambada", ("text",), ("context", "continuation"), _lambada),
    "openbookqa": Source(
        "openbook_qa.jsonl", "openbookqa", ("question_stem", "choices", "answerKey"), _CHOICE, _openbook
    ),
    "piqa": Source("piqa.jsonl", "piqa", ("goal", "sol1", "sol2", "label"), _CHOICE, _piqa),
    "wikitext": Source("wikitext2_test.txt", "wikitext", ("page",)),
    "winogrande": Source(
        "winogrande.jsonl",
        "winogrande",
        ("sentence", "option1", "option2", "answer"),
        ("context_options", "continuation", "gold"),
        _winogrande,
    ),
}
"""The tasks by lm-eval's name, except MMLU's, which has a file for each subject."""

_MMLU_FIELDS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


def available_tasks(folder: Path) -> list[str]:
    """The tasks whose files are in the folder."""
    found = [name for name, source in SOURCES.items() if (folder / source.file).is_file()]
    return [*found, MMLU] if _mmlu_folder(folder) else found


def local_tasks(names: Sequence[str], folder: Path) -> Any:
    """lm-eval's dict of tasks and groups, over the folder's files. ValueError if a task or a file is invalid."""
    import lm_eval
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager

    subjects = _subjects(folder) if any(name.startswith(MMLU) for name in names) else {}
    for name in names:
        if name not in SOURCES and name != MMLU and name not in subjects:
            raise ValueError(
                f"task {name!r} is unknown with --dataset_path: use {', '.join(SOURCES)}, {MMLU} or {MMLU}_<subject> "
                f"(of {len(subjects)} in the folder), or leave --dataset_path out for lm-eval's tasks on the hub"
            )
    homes = {SOURCES[name].home if name in SOURCES else "mmlu/default" for name in names}
    definitions = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[definitions / home for home in sorted(homes)])
    leaves = dict.fromkeys(leaf for name in names for leaf in (subjects if name == MMLU else [name]))
    specs = [
        _spec(leaf, subjects[leaf]() if leaf in subjects else _read_source(folder, SOURCES[leaf])) for leaf in leaves
    ]
    if foreign := [leaf for leaf in leaves if leaf not in manager.all_subtasks]:
        raise ValueError(f"lm-eval has no task {foreign[0]!r}: remove its file from {folder}")
    # lm-eval accepts changes to one of its own tasks only if the task is a member of a group.
    tasks = manager.load({"group": "local", "task": specs})["tasks"]
    if MMLU not in names:
        return manager.load(list(tasks.values()))
    whole = Group.from_config({"group": MMLU, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]})
    for subject in subjects:
        whole.add(tasks.pop(subject))
    return manager.load([*tasks.values(), whole])


def _spec(name: str, rows: dict[str, list[Row]]) -> Row:
    """lm-eval's task with our rows in place of the hub's."""

    def data_set(**_: Any) -> Any:
        from datasets import Dataset

        return {split: Dataset.from_list(some) for split, some in rows.items()}

    return {
        "task": name,
        "custom_dataset": data_set,
        "dataset_path": None,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        # If the examples are drawn from the test rows, lm-eval leaves out the row that is being asked.
        "fewshot_split": "examples" if "examples" in rows else "test",
    }


def _read_source(folder: Path, source: Source) -> dict[str, list[Row]]:
    rows = {"test": _read(folder / source.file, source)}
    if source.examples and (folder / source.examples).is_file():
        rows["examples"] = _read(folder / source.examples, source)
    return rows


def _mmlu_folder(folder: Path) -> Path | None:
    """The parent of MMLU's `test` and `dev`: the folder itself or its `mmlu`; None if neither has them."""
    return next((place for place in (folder, folder / MMLU) if any((place / "test").glob("*_test.csv"))), None)


def _subjects(folder: Path) -> dict[str, Callable[[], dict[str, list[Row]]]]:
    """A function that reads the rows of each MMLU task in the folder, by the task's name."""
    place = _mmlu_folder(folder)
    if place is None:
        raise ValueError(f"--dataset_path = {folder} has no MMLU: put its files at {MMLU}/test/<subject>_test.csv")
    found = sorted(file.name.removesuffix("_test.csv") for file in (place / "test").glob("*_test.csv"))
    return {f"{MMLU}_{subject}": partial(_read_subject, place, subject) for subject in found}


def _read_subject(place: Path, subject: str) -> dict[str, list[Row]]:
    source = Source("", "", ("question", "choices", "answer"), _MMLU_FIELDS, _mmlu)
    rows = {"test": _read(place / "test" / f"{subject}_test.csv", source)}
    examples = place / "dev" / f"{subject}_dev.csv"
    return rows | {"examples": _read(examples, source)} if examples.is_file() else rows


def _read(file: Path, source: Source) -> list[Row]:
    if not file.is_file():
        raise ValueError(f"{file} is missing: the task needs it; see docs/evaluation.md for its form")
    try:
        raw = _parse(file)
        rows = [_convert_row(file, number, row, source) for number, row in enumerate(raw, start=1)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no rows to evaluate")
    return rows


def _parse(file: Path) -> list[Any]:
    if file.suffix == ".txt":
        return [{"page": page} for page in pages(file.read_text(encoding="utf-8"))]
    if file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
    return rows


def pages(text: str) -> list[str]:
    """WikiText's pages, each beginning with its heading."""
    starts = [match.start() for match in TITLE.finditer(text)] or [0]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _convert_row(file: Path, number: int, row: Any, source: Source) -> Row:
    if isinstance(row, dict):
        if all(row.get(field) is not None for field in source.fields):
            return {field: row[field] for field in source.fields}
        if source.convert is not None and all(row.get(field) is not None for field in source.short):
            try:
                return source.convert(row)
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                raise ValueError(f"{file}, row {number} is invalid: {error}") from error
    forms = " or ".join(", ".join(form) for form in (source.fields, source.short) if form)
    raise ValueError(f"{file}, row {number} lacks a field: it needs {forms}")
