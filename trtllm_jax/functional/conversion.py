"""Checkpoints from one format to another, a piece at a time."""

import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.load import as_hugging_face, check, ignorable
from checkpoints.model_files import write_model_files
from checkpoints.orbax_folder import ARRAYS_FOLDER, find_arrays
from checkpoints.output_folder import new_folder
from checkpoints.source import TensorSource
from checkpoints.table import Sizes, Weight, blocks, expand
from sharding import DEFAULT_RULES, Extents
from trtllm_jax.engine import device_memory
from trtllm_jax.logger import logger, progress
from trtllm_jax.models import architecture, gguf_architectures

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
    """The folder `output`, which holds the model that `source` is, in another format or dtype.

    Weights pass through memory a piece at a time, whatever the model's size. `output` appears when it is complete: a
    conversion that fails or is killed leaves the name free, and the next one cleans up after it.

    Args:
        source: a Hugging Face or Orbax folder, a .gguf file, a llama2.c .bin file or a hub name.
        output: the folder to make.
        format: "hf" (config.json, safetensors, tokenizer) or "orbax" (our parameters, with the same files beside them).
        dtype: "float32", "bfloat16" or "float16" for all floating point weights; None keeps each as it is stored, and
            float32 for what was quantised.
        max_shard_size: of a safetensors file, in bytes or as "5GB" or "500MiB".
        tokenizer: another tokenizer than the source's own: a folder, a .gguf file, a llama2.c file or a hub name.
        config: for a `source` that Orbax saved and that has no config.json: the model whose configuration and tokenizer
            go with it.
        revision: of a hub name.
        overwrite: whether a model that `output` already is may be replaced.

    Raises:
        ValueError: an argument is wrong, the source cannot be read or does not fit its configuration, or `output`
            exists, has no room or cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r} is unknown: use one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype = {dtype!r} is unknown: use one of {', '.join(DTYPES)}, or None to keep what is stored"
        )
    shard_bytes = _bytes(max_shard_size)
    checkpoint = _open(source, config, revision)
    target = Path(output).expanduser().resolve()
    _check_apart(checkpoint, target)
    if dtype is not None and "quantization_config" in checkpoint.config:
        raise ValueError(f"dtype = {dtype!r}: {source} holds quantised weights, which are only kept as they are")
    weights = _weights(checkpoint, as_they_are=format == "hf" and _is_safetensors(checkpoint))
    loaded = _tokenizer(checkpoint, tokenizer)
    with new_folder(target, overwrite=overwrite) as folder:
        _write(checkpoint, weights, folder, format, dtype, shard_bytes, loaded)
    return target


@dataclass(frozen=True)
class _Weights:
    """A checkpoint's tensors under Hugging Face's names, and the rows of the model's table where they are needed."""

    source: TensorSource
    names: tuple[str, ...]
    rows: tuple[Weight, ...]
    sizes: Sizes


def _open(source: str | Path, config: str | Path | None, revision: str | None) -> Checkpoint:
    known = gguf_architectures()
    if config is None:
        return open_checkpoint(source, revision=revision, gguf_architectures=known)
    folder = Path(source).expanduser()
    arrays = find_arrays(folder) if folder.is_dir() else None
    if arrays is None:
        raise ValueError(f"config = {config} is for a folder of Orbax arrays, which {source} is not: leave config out")
    model = open_checkpoint(config, revision=revision, weights=False, gguf_architectures=known)
    return replace(model, orbax=arrays).resolve_tied_head()


def _is_safetensors(checkpoint: Checkpoint) -> bool:
    return checkpoint.gguf is None and checkpoint.llama2c is None and checkpoint.orbax is None


def _weights(checkpoint: Checkpoint, *, as_they_are: bool) -> _Weights:
    source = checkpoint.tensors
    if as_they_are:
        return _Weights(source, tuple(source.info), (), {})
    module = architecture(checkpoint.config)
    model = module.Config.from_hf(checkpoint.config)
    rows = expand(module.table(model), model.sizes["layers"])
    source = as_hugging_face(source, rows, model.sizes)
    check(rows, source, sizes=model.sizes, ignore=ignorable(checkpoint.config))
    names = tuple(block.name for row in rows for block in blocks(row, Extents(model.sizes)))
    return _Weights(source, names, rows, model.sizes)


def _tokenizer(checkpoint: Checkpoint, override: str | Path | None) -> "PreTrainedTokenizerBase | None":
    """The tokenizer to save; None where the source's own files are copied, or there is none."""
    if override is not None:
        return checkpoint.load_tokenizer(override)
    if checkpoint.path.is_dir():
        return None
    try:
        return checkpoint.load_tokenizer()
    except ValueError as error:
        logger.warning("The converted model has no tokenizer; name one with the option tokenizer (%s)", error)
        return None


def _write(
    checkpoint: Checkpoint,
    weights: _Weights,
    folder: Path,
    format: str,
    dtype: str | None,
    shard_bytes: int,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> None:
    # Orbax and tensorstore are for those who need them.
    from checkpoints.safetensors_writer import tensor_infos, write_safetensors

    infos = tensor_infos(weights.source, weights.names, dtype)
    if format == "orbax":
        from checkpoints.orbax_writer import array_infos, write_orbax

        infos = array_infos(weights.rows, weights.source, weights.sizes, dtype)
    total = sum(info.nbytes for info in infos.values())
    _check_room(folder, total)
    main = Counter[str]()
    for info in infos.values():
        main[info.dtype] += info.nbytes
    stated = main.most_common(1)[0][0]
    write_model_files(checkpoint, folder, dtype=stated, cast=dtype is not None, tokenizer=tokenizer)
    with progress(total, "Converting weights", unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done - bar.n)

        if format == "hf":
            write_safetensors(weights.source, folder, infos=infos, max_shard_bytes=shard_bytes, progress=show)
        else:
            # Orbax starts JAX, and whoever serves the model afterwards wants its share of the GPU.
            device_memory.claim()
            write_orbax(
                weights.rows,
                weights.source,
                folder / ARRAYS_FOLDER,
                sizes=weights.sizes,
                infos=infos,
                split=frozenset(DEFAULT_RULES),
                progress=show,
            )


def _bytes(size: int | str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", str(size).strip().upper())
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ValueError(f'max_shard_size = {size!r} is no size: write bytes, or for example "5GB" or "500MiB"')
    return int(float(found[1]) * unit)


def _check_apart(checkpoint: Checkpoint, output: Path) -> None:
    for path in (checkpoint.path.resolve(), *((checkpoint.orbax.resolve(),) if checkpoint.orbax else ())):
        if path.is_relative_to(output) or output.is_relative_to(path):
            raise ValueError(f"output = {output} and the source {path} lie in each other: choose another output")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"output: the converted weights take {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB "
            "left: free some, or choose another place"
        )
