"""A folder that appears under its name only when it is complete."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when the block ends well and vanishes when it raises.

    It lies beside `output`, hidden. What a killed process left there is cleaned up by the next one, which refuses to
    start while the first still runs. All files are on the disk before the name is there. With `overwrite` the model
    that `output` was is replaced at the end; ValueError where it exists otherwise, is no model's folder, or where the
    system refuses to write: a full disk, a folder that is read-only.
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
        _empty(partial)
        yield partial
        _to_disk(partial)
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        _sync(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _recover(output, replaced)
        raise
    finally:
        os.close(lock)


def _lock(partial: Path, output: Path) -> int:
    """A descriptor of the partial folder whose lock ends with this process, however it ends."""
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
    """Finish what was stopped between the two renames."""
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


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _to_disk(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
