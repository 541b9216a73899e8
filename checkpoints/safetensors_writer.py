"""Writes safetensors files piece by piece: the header first, then every tensor.

The safetensors package writes from memory only. Format: https://github.com/huggingface/safetensors#format
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from checkpoints.load import Progress
from checkpoints.pieces import cast, contiguous_step, grid
from checkpoints.safetensors_file import DTYPES
from checkpoints.safetensors_source import INDEX_FILE, SINGLE_FILE
from checkpoints.source import TensorInfo, TensorSource

_NAME_OF = {np.dtype(dtype).name: name for name, dtype in DTYPES.items()}


def tensor_infos(source: TensorSource, names: Iterable[str], dtype: npt.DTypeLike | None) -> dict[str, TensorInfo]:
    """The tensors of `write_safetensors`: floating point ones in `dtype` if one is given, others unchanged."""

    def kept(info: TensorInfo) -> bool:
        return dtype is None or np.dtype(info.dtype).kind in "iub"

    infos = {name: source.info[name] for name in sorted(names, key=_by_number)}
    return {n: info if kept(info) else TensorInfo(info.shape, np.dtype(dtype).name) for n, info in infos.items()}


def write_safetensors(
    source: TensorSource,
    folder: Path,
    *,
    infos: Mapping[str, TensorInfo],
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """The tensors of `infos` as model.safetensors, or as numbered files of at most `max_shard_bytes` and their index.

    A tensor larger than that has a file of its own. `progress(done, total)` counts bytes written. At most a few pieces
    of PIECE_BYTES are in memory.
    """
    shards = _shards(infos, max_shard_bytes)
    total = sum(info.nbytes for info in infos.values())
    index: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("xb") as file:
            _write_header(file, shard)
            for tensor, info in shard.items():
                for size in _write_tensor(file, tensor, info, source):
                    done += size
                    if progress is not None:
                        progress(done, total)
        index |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _shards(infos: Mapping[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    # Wide items first, so that each tensor is aligned whatever the sizes of those before it.
    return [dict(sorted(s.items(), key=lambda entry: -np.dtype(entry[1].dtype).itemsize)) for s in shards]


def _write_header(file: BinaryIO, shard: Mapping[str, TensorInfo]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    offset = 0
    for name, info in shard.items():
        end = offset + info.nbytes
        header[name] = {"dtype": _NAME_OF[info.dtype], "shape": info.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(file: BinaryIO, name: str, info: TensorInfo, source: TensorSource) -> Iterable[int]:
    # A piece is in memory in both dtypes, so the wider one decides its size.
    widest = max(np.dtype(source.info[name].dtype).itemsize, np.dtype(info.dtype).itemsize)
    for window in grid(info.shape, contiguous_step(info.shape, widest)):
        piece = source.read(name, tuple(slice(*part) for part in window))
        values = np.ascontiguousarray(cast(piece, info.dtype, name))
        yield file.write(values.reshape(-1).view(np.uint8).data)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
