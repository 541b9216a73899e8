"""The record of what is particular to one architecture in GGUF files; each file in `trtllm_jax/models` has its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from checkpoints.error_text import short_repr

if TYPE_CHECKING:
    from checkpoints.gguf_file import GgufFile


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """How llama.cpp's files hold one architecture, beyond what they hold in the same way for all.

    Attributes:
        name: the value of `general.architecture`, which is also the prefix of the metadata keys, as in "llama".
        model_type: the `model_type` of the Hugging Face configuration.
        model_class: the class that the configuration's `architectures` names.
        permuted: the modules whose rows are stored with the two halves of each head interleaved (`LlamaModel.permute`
            in llama.cpp's convert_hf_to_gguf.py), each with the configuration field that has its number of heads.
        transposed: the modules whose matrices Hugging Face stores with the inputs first, and llama.cpp does not.
        tensors: Hugging Face names of modules that `gguf_names.MODULES` does not have, or has under other names:
            {"blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm"}.
        metadata: further metadata keys, without the prefix, and the configuration fields that their numbers become
            where a file states them: {"attention.sliding_window": "sliding_window"}.
        config: configuration fields that have the same value in every file.
        derived: the configuration fields that follow from the others, which it is given.
        norms_plus_one: whether the weights of norms are stored plus one (`Gemma2Model.modify_tensors` in llama.cpp's
            convert_hf_to_gguf.py).
        partial_rotary: whether the architecture may rotate a part of each head, its `partial_rotary_factor`.
    """

    name: str
    model_type: str
    model_class: str
    permuted: Mapping[str, str] = field(default_factory=dict)
    transposed: Collection[str] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default_factory=lambda: lambda config: {})
    norms_plus_one: bool = False
    partial_rotary: bool = False


def query_scalar(layers: int) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """What `derived` is for Gemma 2 and 3, whose files do not state what queries are scaled by, as llama.cpp has it.

    A model of so many layers scales by the channels that the residual stream has for each head, others by a head's.
    """

    def derived(config: Mapping[str, Any]) -> Mapping[str, Any]:
        of_stream = config["hidden_size"] // config["num_attention_heads"]
        return {"query_pre_attn_scalar": of_stream if config["num_hidden_layers"] == layers else config["head_dim"]}

    return derived


def find_architecture(file: GgufFile, known: Iterable[GgufArchitecture]) -> GgufArchitecture:
    """The record of the file's architecture; ValueError, with the supported names, where none is known."""
    by_name = {architecture.name: architecture for architecture in known}
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in by_name:
        raise ValueError(
            f"{file.path} has the architecture {short_repr(name)}; supported in GGUF: "
            f"{', '.join(sorted(by_name)) or 'none'}"
        )
    return by_name[name]
