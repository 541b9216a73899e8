"""A folder that gets its name when it is complete."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder, which is renamed to `output` if the block succeeds and removed if it raises.

    It is hidden, in the same parent folder. If a process is killed, the next one removes its folder; a second process
    is refused while the first one runs. All files are synced to the disk before the rename. With `overwrite` an
    existing model is replaced at the end. ValueError where `output` exists otherwise or is no model's folder, and where
    writing fails: the disk is full, or the folder read-only.
    """
    try:
        with _locked_folder(output.expanduser().absolute(), overwrite) as folder:
            yield folder
    except OSError as error:
        raise ValueError(
            f"output = {output} cannot be written: {error}; free some room, or choose another place"
        ) from error


@contextmanager
def _locked_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    partial, replaced = (output.with_name(f".{output.name}.{state}") for state in ("partial", "replaced"))
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(partial, output)
    try:
        _recover(output, replaced)
        _check_output(output, overwrite)
        _remove_content(partial)
        yield partial
        _fsync_all(partial)
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        _fsync(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _recover(output, replaced)
        raise
    finally:
        os.close(lock)


def _lock(partial: Path, output: Path) -> int:
    """A descriptor of the partial folder, locked until this process ends in any way."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who held it may have renamed the folder meanwhile.
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"output = {output}: another process is writing it; wait for it, or choose another") from error
    return descriptor


def _recover(output: Path, replaced: Path) -> None:
    """Complete a replacement that was interrupted between its two renames."""
    if replaced.exists():
        if output.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(output)


def _check_output(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"output = {output} exists; choose another name, or overwrite it with overwrite=True")
    if output.is_symlink() or not output.is_dir():
        raise ValueError(f"output = {output} is not a folder; only a model's folder is overwritten")
    if any(output.iterdir()) and not (output / "config.json").is_file():
        raise ValueError(f"output = {output} is no model's folder (it holds no config.json), so it is not overwritten")


def _remove_content(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _fsync_all(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _fsync(Path(parent, name))
        _fsync(Path(parent))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
