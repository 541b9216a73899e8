"""What a conversion reads: the source's checkpoint, weights and tokenizer."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.load import as_hugging_face, check
from checkpoints.orbax_folder import find_arrays
from checkpoints.source import TensorSource
from checkpoints.table import Sizes, Weight, blocks, expand, stored_shapes
from sharding import Extents
from trtllm_jax.logger import logger
from trtllm_jax.models import gguf_architectures, read_architecture, unread_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SourceWeights:
    """A checkpoint's tensors under Hugging Face's names, and the rows of the model's weight table if they are needed.

    Attributes:
        source: the tensors.
        names: of the tensors to convert.
        rows: of the weight table; empty if tensors are copied unchanged.
        sizes: the extent of each logical axis; empty if tensors are copied unchanged.
    """

    source: TensorSource
    names: tuple[str, ...]
    rows: tuple[Weight, ...]
    sizes: Sizes


def open_source(source: str | Path, config: str | Path | None, revision: str | None) -> Checkpoint:
    """The checkpoint `source`; with `config`, the Orbax arrays of `source` and the other files of `config`."""
    known = gguf_architectures()
    if config is None:
        return open_checkpoint(source, revision=revision, gguf_architectures=known)
    folder = Path(source).expanduser()
    arrays = find_arrays(folder) if folder.is_dir() else None
    if arrays is None:
        raise ValueError(f"config = {config} is for a folder of Orbax arrays, which {source} is not: leave config out")
    model = open_checkpoint(config, revision=revision, weights=False, gguf_architectures=known)
    return replace(model, orbax=arrays).resolve_tied_head()


def is_safetensors(checkpoint: Checkpoint) -> bool:
    """Whether the weights are stored as safetensors."""
    return checkpoint.gguf is None and checkpoint.llama2c is None and checkpoint.orbax is None


def read_weights(checkpoint: Checkpoint, *, unchanged: bool) -> SourceWeights:
    """The weights to convert: all tensors if `unchanged`, else those in the architecture's weight table.

    ValueError if they do not fit the table.
    """
    source = checkpoint.tensors
    if unchanged:
        return SourceWeights(source, tuple(source.info), (), {})
    module, model = read_architecture(checkpoint)
    rows = expand(module.table(model), model.sizes["layers"])
    source = as_hugging_face(source, rows, model.sizes)
    with checkpoint.named_in_errors():
        check(rows, source, sizes=model.sizes, ignore=unread_tensors(module, checkpoint.config))
    names = tuple(stored_shapes(block for row in rows for block in blocks(row, Extents(model.sizes))))
    return SourceWeights(source, names, rows, model.sizes)


def tokenizer_to_save(checkpoint: Checkpoint, override: str | Path | None) -> "PreTrainedTokenizerBase | None":
    """The tokenizer to save; None if the source's tokenizer files are copied, or if it has no tokenizer."""
    if override is not None:
        return checkpoint.load_tokenizer(override)
    if checkpoint.path.is_dir():
        return None
    try:
        return checkpoint.load_tokenizer()
    except ValueError as error:
        logger.warning("The converted model has no tokenizer; name one with the option tokenizer (%s)", error)
        return None
