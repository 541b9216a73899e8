"""Opens regular files in a model's folder or in the hub's cache, and no others."""

import mmap
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from checkpoints.error_text import one_line, short_repr

# A hub cache's snapshots are links to `models--org--name/blobs/<hash>`, some of these to `blobs/<xx>/<hash>` beside it.
_HUB_BLOB = re.compile(r".*/(models--[^/]+/blobs/[0-9a-f]{40,64}|blobs/[0-9a-f]{2}/[0-9a-f]{64})", re.DOTALL)


def open_regular(path: Path, folder: Path | None = None) -> BinaryIO:
    """`path`, open for reading. ValueError, with the remedy, where it is no regular file or cannot be read.

    With links resolved it must be in `folder` or in a hub's cache; without `folder` the user named the file itself,
    which may be anywhere. Nothing is opened before it is known to be a regular file: opening a pipe waits for its
    writer, opening a device may do anything.
    """
    check_regular(path, folder)
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def check_regular(path: Path, folder: Path | None = None) -> os.stat_result:
    """The status of the file that `open_regular` would open, or the ValueError that it would raise."""
    try:
        status = path.stat()
        outside = folder is not None and not _is_inside(path, folder)
    except (OSError, RuntimeError, ValueError) as error:  # absent or a loop of links; a name that no file can have
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file; put the model's own file in its place")
    if outside:
        raise ValueError(
            f"{path} is a link to {short_repr(os.path.realpath(path))}, outside the model's folder, so it is not "
            "read; put the file itself or a hard link there, or give the folder that the link leads to"
        )
    return status


def map_regular(path: Path, folder: Path | None = None) -> mmap.mmap:
    """The bytes of the file that `open_regular` opens, memory-mapped; ValueError where there are none."""
    with open_regular(path, folder) as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is truncated: it is empty. Download or convert the model again")
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, OverflowError, ValueError) as error:
            raise _unreadable(path, error) from error


def _is_inside(path: Path, folder: Path) -> bool:
    target = path.resolve(strict=True)
    return target.is_relative_to(folder.resolve(strict=True)) or _HUB_BLOB.fullmatch(str(target)) is not None


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or one_line(str(error))
    return ValueError(f"{path} cannot be read: {reason}. Check the file, its permissions and where links lead")
