"""The format of the model at a path. Imports little, so that opening a checkpoint stays quick."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.orbax_folder import METADATA_FILE

if TYPE_CHECKING:
    from checkpoints.gguf_file import GgufFile

logger = logging.getLogger("trtllm_jax")


def warn_of_other_formats(folder: Path) -> None:
    """Warn which weights are read if a folder holds several formats, since rounded ones cannot be compared."""
    patterns = ("*.safetensors", "*.gguf", f"*/{METADATA_FILE}")
    first, *others = [min(files) for pattern in patterns if (files := list(folder.glob(pattern)))] or [folder]
    for other in others:
        logger.warning(
            "%s holds weights as %s and as %s: only the former are read",
            folder, first.relative_to(folder), other.relative_to(folder),
        )  # fmt: skip


def is_llama2c_file(path: Path) -> bool:
    """Whether `path` is a file of llama2.c, by its name."""
    return path.suffix.lower() == ".bin" and not path.is_dir()


def open_gguf(path: Path) -> GgufFile | None:
    """The GGUF file at `path`, or the only one in the folder `path`; None if its weights have another format."""
    folder = path if path.is_dir() else None
    if folder is not None:
        found = sorted(path.glob("*.gguf"))
        if not found or any(path.glob("*.safetensors")):
            return None
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds several GGUF files ({names}); give the path of one of them")
        path = found[0]
    elif path.suffix.lower() != ".gguf":
        raise ValueError(f"{path} is neither a folder nor a .gguf file; give the folder that holds it")
    from checkpoints.gguf_file import GgufFile

    return GgufFile(path, folder)


def check_folder(path: Path, orbax: Path | None) -> None:
    """ValueError, with the remedy, unless the folder has a config.json and its weights a format that is read."""
    if orbax is not None and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} holds Orbax arrays and no config.json: put the model's config.json and tokenizer beside them, or "
            "convert it with the option config, which takes them from another folder of the model"
        )
    if orbax is None and not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickled:
            raise ValueError(
                f"{path} holds weights only as {', '.join(pickled)}: only safetensors, GGUF and Orbax are read, "
                "because loading the others may run code. Convert them to safetensors first"
            )
    if not os.path.lexists(path / "config.json"):
        raise ValueError(f"{path} holds no config.json and no .gguf file, so it is not a model's folder")
