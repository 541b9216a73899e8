"""Converts checkpoints between formats and dtypes, reading a piece of a weight at a time."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.checkpoint import Checkpoint
from checkpoints.model_files import write_model_files
from checkpoints.orbax_folder import ARRAYS_FOLDER
from checkpoints.output_folder import new_folder
from sharding import DEFAULT_RULES, general
from trtllm_jax.engine import device_memory
from trtllm_jax.functional.conversion_source import (
    SourceWeights,
    is_safetensors,
    open_source,
    read_weights,
    tokenizer_to_save,
)
from trtllm_jax.logger import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("hf", "orbax")
DTYPES = ("float32", "bfloat16", "float16")

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert the model at `source` to another format or dtype, and return the path of the folder `output`.

    Memory holds only a piece of a weight at a time, whatever the model's size. `output` appears once it is complete: a
    conversion that fails or is killed leaves nothing under that name, and the next one removes its temporary files.

    Args:
        source: a Hugging Face or Orbax folder, a .gguf file, a llama2.c .bin file or a hub name.
        output: the folder to create.
        format: "hf" (config.json, safetensors, tokenizer) or "orbax" (this library's parameter tree, config.json and
            tokenizer).
        dtype: "float32", "bfloat16" or "float16" for all floating-point weights. With None each keeps its stored
            dtype, and quantised weights become float32.
        max_shard_size: of a safetensors file, in bytes or as "5GB" or "500MiB".
        tokenizer: a tokenizer to use instead of the source's: a folder, a .gguf file, a llama2.c file or a hub name.
        config: the model whose configuration and tokenizer to use, for a `source` that Orbax saved without config.json.
        revision: of a hub name.
        overwrite: whether `output` may replace a model that exists there.

    Raises:
        ValueError: an argument is invalid, the source cannot be read or does not fit its configuration, or `output`
            exists, does not fit on the disk or cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype = {dtype!r} is unknown: use one of {', '.join(DTYPES)}, or None to keep what is stored"
        )
    shard_bytes = _bytes(max_shard_size)
    checkpoint = open_source(source, config, revision)
    target = Path(output).expanduser().resolve()
    _check_not_nested(checkpoint, target)
    if dtype is not None and "quantization_config" in checkpoint.config:
        raise ValueError(f"dtype = {dtype!r}: {source} holds quantised weights, which cannot be cast: leave dtype out")
    weights = read_weights(checkpoint, unchanged=format == "hf" and is_safetensors(checkpoint))
    loaded = tokenizer_to_save(checkpoint, tokenizer)
    with new_folder(target, overwrite=overwrite) as folder:
        _write(checkpoint, weights, folder, format, dtype, shard_bytes, loaded)
    return target


def _write(
    checkpoint: Checkpoint,
    weights: SourceWeights,
    folder: Path,
    format: str,
    dtype: str | None,
    shard_bytes: int,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> None:
    # Imported here, because Orbax and tensorstore are slow to import.
    from checkpoints.safetensors_writer import tensor_infos, write_safetensors

    infos = tensor_infos(weights.source, weights.names, dtype)
    if format == "orbax":
        from checkpoints.orbax_writer import array_infos, write_orbax

        infos = array_infos(weights.rows, weights.source, weights.sizes, dtype)
    total = sum(info.nbytes for info in infos.values())
    _check_room(folder, total)
    bytes_of_dtype = Counter[str]()
    for info in infos.values():
        bytes_of_dtype[info.dtype] += info.nbytes
    ((main_dtype, _),) = bytes_of_dtype.most_common(1)
    write_model_files(checkpoint, folder, dtype=main_dtype, cast=dtype is not None, tokenizer=tokenizer)
    with progress(total, "Converting weights", unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.n)

        if format == "hf":
            write_safetensors(weights.source, folder, infos=infos, max_shard_bytes=shard_bytes, progress=show)
        else:
            # Before Orbax initialises JAX, after which the fraction of GPU memory could no longer be set.
            device_memory.claim()
            write_orbax(
                weights.rows,
                weights.source,
                folder / ARRAYS_FOLDER,
                sizes=weights.sizes,
                infos=infos,
                split=frozenset(axis for axis in weights.sizes if general(axis) in DEFAULT_RULES),
                progress=show,
            )


def _bytes(size: int | str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", str(size).strip().upper())
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ValueError(f'max_shard_size = {size!r} is not a size: give bytes, or for example "5GB" or "500MiB"')
    return int(float(found[1]) * unit)


def _check_not_nested(checkpoint: Checkpoint, output: Path) -> None:
    for path in (checkpoint.path.resolve(), *((checkpoint.orbax.resolve(),) if checkpoint.orbax else ())):
        if path.is_relative_to(output) or output.is_relative_to(path):
            raise ValueError(f"output = {output} and the source {path} contain one another: choose another output")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"output: the converted weights take {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB "
            "left: free some space, or choose another disk"
        )
