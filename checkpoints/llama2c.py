"""Models in the legacy binary format of llama2.c: seven numbers, then every weight in float32.

Format: `legacy_export` in https://github.com/karpathy/llama2.c/blob/master/export.py, and `memory_map_weights` of its
run.c. The stored rotation tables are skipped, as run.c does: it rotates by the base 10000 whatever they say.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from checkpoints.regular_file import map_regular
from checkpoints.source import TensorInfo

SUFFIX = ".bin"
BOS, EOS = 1, 2

_ROTATIONS = "cosines, then sines"
_HEADER = struct.Struct("<7i")


class _Header(NamedTuple):
    """The file's header."""

    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    seq_len: int


class _Stored(NamedTuple):
    offset: int  # in values of the data
    shape: tuple[int, ...]
    heads: int | None


class Llama2cFile:
    """An open file, as a `TensorSource` in float32. ValueError, naming the file, where it is not one or is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A plain array over the mapping: slices of numpy's memmap class cost several times more.
        mapped = np.frombuffer(map_regular(path), np.uint8)
        if mapped.size < _HEADER.size:
            raise ValueError(f"{path} is no llama2.c model: it has {mapped.size} bytes")
        stated = _Header(*_HEADER.unpack_from(mapped.data))
        # A negative vocabulary says that the classifier has weights of its own.
        self._shape, self._tied = stated._replace(vocab=abs(stated.vocab)), stated.vocab > 0
        self._check_header(mapped.size)
        self._stored = _layout(self._shape, self._tied)
        self._data = mapped[_HEADER.size :].view("<f4")
        self.info: Mapping[str, TensorInfo] = {
            name: TensorInfo(stored.shape, "float32") for name, stored in self._stored.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A view of one part of the mapped file, or a copy for q and k, whose rows are reordered."""
        offset, shape, heads = self._stored[name]
        tensor = self._data[offset : offset + math.prod(shape)].reshape(shape)
        if heads is None:
            return tensor[index]
        # The file has the two halves of a head interleaved, Hugging Face has one half after the other.
        rows = np.arange(shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
        return tensor[rows[index[0]]][:, *index[1:]]

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary."""
        return self._shape.vocab

    def config(self) -> dict[str, Any]:
        """The model's configuration in the form of a Hugging Face config.json."""
        shape = self._shape
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": shape.dim,
            "intermediate_size": shape.hidden_dim,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.dim // shape.heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": shape.seq_len,
            "vocab_size": shape.vocab,
            "tie_word_embeddings": self._tied,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "dtype": "float32",
        }

    def generation_config(self) -> dict[str, Any]:
        """The ids that end a sequence; run.c also stops at the token that starts the next story."""
        return {"bos_token_id": BOS, "eos_token_id": [EOS, BOS]}

    def _check_header(self, size: int) -> None:
        """Validate the header before its numbers are used as sizes."""
        shape = self._shape
        stated = "(dim, hidden_dim, layers, heads, kv_heads, vocabulary, seq_len)"
        if min(shape) < 1 or shape.dim % (2 * shape.heads) or shape.heads % shape.kv_heads:
            raise ValueError(f"{self.path} is no llama2.c model in the legacy format: {stated} is {tuple(shape)}")
        values = sum(
            math.prod(part.shape) * (shape.layers if part.layered else 1) for part in _parts(shape, self._tied)
        )
        if size != _HEADER.size + 4 * values:
            raise ValueError(
                f"{self.path} is damaged or no llama2.c model in the legacy format: it has {size} bytes, and "
                f"{stated} = {tuple(shape)} takes {_HEADER.size + 4 * values}"
            )


class _Part(NamedTuple):
    """The next part of the file: a tensor, or if its name has `{i}` one tensor for each layer."""

    name: str
    shape: tuple[int, ...]
    heads: int | None = None  # of a tensor whose rows are pairs to rotate, one after the other

    @property
    def layered(self) -> bool:
        return "{i}" in self.name


def _parts(shape: _Header, tied: bool) -> tuple[_Part, ...]:
    head_dim = shape.dim // shape.heads
    row, wide = (shape.dim,), (shape.hidden_dim, shape.dim)
    square, kv = (shape.dim, shape.dim), (head_dim * shape.kv_heads, shape.dim)
    layer = "model.layers.{i}"
    return (
        _Part("model.embed_tokens.weight", (shape.vocab, shape.dim)),
        _Part(f"{layer}.input_layernorm.weight", row),
        _Part(f"{layer}.self_attn.q_proj.weight", square, shape.heads),
        _Part(f"{layer}.self_attn.k_proj.weight", kv, shape.kv_heads),
        _Part(f"{layer}.self_attn.v_proj.weight", kv),
        _Part(f"{layer}.self_attn.o_proj.weight", square),
        _Part(f"{layer}.post_attention_layernorm.weight", row),
        _Part(f"{layer}.mlp.gate_proj.weight", wide),
        _Part(f"{layer}.mlp.down_proj.weight", wide[::-1]),
        _Part(f"{layer}.mlp.up_proj.weight", wide),
        _Part("model.norm.weight", row),
        _Part(_ROTATIONS, (shape.seq_len, head_dim)),
        *(() if tied else (_Part("lm_head.weight", (shape.vocab, shape.dim)),)),
    )


def _layout(shape: _Header, tied: bool) -> dict[str, _Stored]:
    """The location of every tensor by its Hugging Face name."""
    stored: dict[str, _Stored] = {}
    offset = 0
    for part in _parts(shape, tied):
        for layer in range(shape.layers if part.layered else 1):
            stored[part.name.replace("{i}", str(layer))] = _Stored(offset, part.shape, part.heads)
            offset += math.prod(part.shape)
    del stored[_ROTATIONS]
    return stored
