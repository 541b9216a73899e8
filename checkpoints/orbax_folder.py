"""Finds the Orbax arrays in a model's folder. Imports nothing, so that opening a checkpoint stays quick."""

from pathlib import Path

METADATA_FILE = "_METADATA"
ARRAYS_FOLDER = "params"
"""The subfolder that arrays are written to; they are read from a subfolder of any name."""

_UNFINISHED = ".orbax-checkpoint-tmp"


def find_arrays(folder: Path) -> Path | None:
    """`folder`, or its one subfolder, if Orbax wrote it; ValueError where there are several or an unfinished one."""
    if (folder / METADATA_FILE).is_file():
        return folder
    found = sorted(path.parent for path in folder.glob(f"*/{METADATA_FILE}"))
    complete = [path for path in found if _UNFINISHED not in path.name]
    if len(complete) > 1:
        names = ", ".join(path.name for path in complete)
        raise ValueError(f"{folder} holds several Orbax checkpoints ({names}); keep the one that is the model")
    if complete:
        return complete[0]
    if unfinished := sorted(path.name for path in folder.glob(f"*{_UNFINISHED}*")):
        raise ValueError(f"{folder} holds only {unfinished[0]}, an Orbax checkpoint whose saving did not finish")
    return None
