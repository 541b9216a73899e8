from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import output_folder
from checkpoints.output_folder import new_folder

FILLS = """
import os, sys, pathlib
from checkpoints.output_folder import new_folder
with new_folder(pathlib.Path(sys.argv[1]), overwrite=sys.argv[2] == "overwrite") as folder:
    (folder / "config.json").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def started(output: Path, mode: str = "new") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", FILLS, output, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(output: Path, text: str = "{}", **kwargs: bool) -> None:
    with new_folder(output, **kwargs) as folder:
        assert folder.parent == output.parent
        (folder / "config.json").write_text(text)
        (folder / "params").mkdir()
        (folder / "params" / "data").write_text("x")


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "new" / "model"
    with new_folder(output) as folder:
        (folder / "file").write_text("x")
        assert not output.exists()
    assert names(output.parent) == ["model"]
    assert names(output) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(error: type[BaseException], tmp_path: Path) -> None:
    def fails() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fails()
    assert names(tmp_path) == []


@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_a_killed_process_leaves_what_was_there_and_the_next_cleans_up(mode: str, tmp_path: Path) -> None:
    output = tmp_path / "model"
    if mode == "overwrite":
        fill(output, "old")
    process = started(output, mode)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (output / "config.json").exists() == (mode == "overwrite")
    assert ".model.partial" in names(tmp_path)
    fill(output, "new", overwrite=mode == "overwrite")
    assert names(tmp_path) == ["model"]
    assert (output / "config.json").read_text() == "new"


def test_control_c_leaves_nothing(tmp_path: Path) -> None:
    process = started(tmp_path / "model")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert names(tmp_path) == []


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_an_interrupt_at_the_end_leaves_the_old_or_the_new(
    renamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model"
    fill(output, "old")
    rename, calls = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == renamed + 1:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        if renamed == 2:
            patch.setattr(output_folder, "_fsync", lambda path: interrupted(path, path) if path == tmp_path else None)
        with pytest.raises(KeyboardInterrupt):
            fill(output, "new", overwrite=True)
    assert (output / "config.json").read_text() == ("new" if renamed == 2 else "old")
    assert names(tmp_path) == ["model"]


def test_where_nothing_can_be_written_the_error_names_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "model", tmp_path / ("x" * 250)):
        with pytest.raises(ValueError, match=f"output = {output} cannot be written: .*; free some room, or choose"):
            fill(output)
    with (
        pytest.raises(ValueError, match=r"model cannot be written: .*No space left on device"),
        new_folder(tmp_path / "model"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == ["file"]


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    output = tmp_path / "model"
    process = started(output)
    with pytest.raises(ValueError, match="model: another process is writing it"):
        fill(output)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert (output / "config.json").read_text() == "half"


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    output = tmp_path / "model"
    fill(output, "old")
    with pytest.raises(ValueError, match="model exists; choose another name, or overwrite it"):
        fill(output)
    assert (output / "config.json").read_text() == "old"
    with pytest.raises(ZeroDivisionError), new_folder(output, overwrite=True):
        _ = 1 / 0
    assert (output / "config.json").read_text() == "old"
    fill(output, "new", overwrite=True)
    assert (output / "config.json").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_only_a_model_is_overwritten(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters").write_text("dear")
    with pytest.raises(ValueError, match="home is no model's folder"):
        fill(home, overwrite=True)
    (tmp_path / "link").symlink_to(home)
    for name in ("home/letters", "link"):
        with pytest.raises(ValueError, match="is not a folder; only a model's folder is overwritten"):
            fill(tmp_path / name, overwrite=True)
    assert names(home) == ["letters"]
    assert names(tmp_path) == ["home", "link"]


@pytest.mark.parametrize("new_is_there", [True, False])
def test_a_process_killed_between_the_two_renames_loses_nothing(new_is_there: bool, tmp_path: Path) -> None:
    output = tmp_path / "model"
    fill(output, "old")
    os.rename(output, tmp_path / ".model.replaced")
    if new_is_there:
        fill(tmp_path / "other", "new")
        os.rename(tmp_path / "other", output)
    with pytest.raises(ValueError, match="exists"):
        fill(output)
    assert (output / "config.json").read_text() == ("new" if new_is_there else "old")
    assert names(tmp_path) == ["model"]
