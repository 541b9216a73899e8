"""A short fuzz run of fixed seed, without atheris; `make fuzz` is the long one. And the property can fail."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from . import mutation, run, seeds, targets

MEMORY = 16 << 20  # bytes that one small file may make Python and numpy allocate
RUNS = {"tokenizer.json": 200, "tokenizer_config.json": 150, "model.gguf": 250, "model.bin": 150}

each_kind = pytest.mark.parametrize("kind", run.KINDS, ids=lambda kind: kind.file)


@pytest.fixture
def folder(kind: run.Kind, tmp_path: Path) -> Path:
    """What a file of that kind needs beside it."""
    for name, source in kind.beside:
        (tmp_path / name).write_bytes(getattr(seeds, source)()[0])
    return tmp_path


@each_kind
def test_seeds_are_valid(kind: run.Kind, folder: Path) -> None:
    read = getattr(targets, kind.read)
    for content in getattr(seeds, kind.seeds)():
        (folder / kind.file).write_bytes(content)
        read(folder, content)


@each_kind
def test_damaged_files_are_read_or_refused(kind: run.Kind, folder: Path) -> None:
    rng = random.Random(0)
    valid = getattr(seeds, kind.seeds)()
    read, change = getattr(targets, kind.read), getattr(mutation, kind.mutate)
    (folder / kind.file).write_bytes(valid[0])
    read(folder, valid[0])  # what is imported or allocated once
    accepted = 0
    runs = RUNS.get(kind.file, 600)
    tracemalloc.start()
    try:
        for _ in range(runs):
            content = rng.choice(valid)
            for _ in range(rng.choice((1, 1, 2, 4))):
                content = change(content, rng)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            accepted += targets.run(read, folder, kind.file, content)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < MEMORY, content
    finally:
        tracemalloc.stop()
    assert 0 < accepted < runs  # both answers are met


def unclear() -> None:
    raise ValueError("bad value")


def wrong_kind() -> None:
    raise KeyError("shape")


def no_exception() -> None:
    raise BaseException("panic")


def slow() -> None:
    end = time.process_time() + targets.SECONDS + 0.1
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("defect", [unclear, wrong_kind, no_exception, slow])
def test_a_reader_with_a_defect_is_found(defect: Callable[[], None], tmp_path: Path) -> None:
    with pytest.raises(targets.Broken):
        targets.run(lambda folder, content: defect(), tmp_path, "file", b"")
