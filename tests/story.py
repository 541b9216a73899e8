"""A tiny model that has memorised a story: trained with transformers, then written like llama2.c's `legacy_export`."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside."
HEADS, KV_HEADS, LAYERS, LENGTH = 4, 2, 2, 128


class Story(NamedTuple):
    """The model's file, with its tokenizer beside it, and the text that it has memorised.

    `ids` are BOS, a space as sentencepiece adds it, and a token for each character of the text.
    """

    model: Path
    text: str
    ids: list[int]


def write_story(folder: Path) -> Story:
    """Trains until every next character of the text is the likeliest by far; the same numbers every time."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), *sorted(set(TEXT))]
    ids = [1, *(pieces.index(character) for character in " " + TEXT)]
    entries = [struct.pack("<fi", -1.0, len(piece.encode())) + piece.encode() for piece in pieces]
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", max(map(len, pieces))) + b"".join(entries))
    model = _trained(ids, len(pieces))
    config = model.config
    header = (config.hidden_size, config.intermediate_size, LAYERS, HEADS, KV_HEADS, len(pieces), LENGTH)
    stored = struct.pack("<7i", *header) + b"".join(tensor.numpy().tobytes() for tensor in _in_order(model))
    (folder / "model.bin").write_bytes(stored)
    return Story(folder / "model.bin", TEXT, ids)


def _trained(ids: list[int], vocab: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, rms_norm_eps=1e-5,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=LENGTH,
            tie_word_embeddings=True, initializer_range=0.1,
        )
    )  # fmt: skip
    story = torch.tensor([ids])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(500):
        loss = model(story, labels=story).loss
        if loss < 0.02:
            return model.requires_grad_(False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the story was not learnt: its loss is {loss}")


def _in_order(model: Any) -> list[Any]:
    """Every tensor in the file's order; in the rows of q and k the two channels that rope rotates are adjacent."""
    import torch

    layers = model.model.layers

    def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape).contiguous()

    attentions, blocks = [layer.self_attn for layer in layers], [layer.mlp for layer in layers]
    return [
        model.model.embed_tokens.weight,
        *(layer.input_layernorm.weight for layer in layers),
        *(paired(attention.q_proj.weight, HEADS) for attention in attentions),
        *(paired(attention.k_proj.weight, KV_HEADS) for attention in attentions),
        *(attention.v_proj.weight for attention in attentions),
        *(attention.o_proj.weight for attention in attentions),
        *(layer.post_attention_layernorm.weight for layer in layers),
        *(block.gate_proj.weight for block in blocks),
        *(block.down_proj.weight for block in blocks),
        *(block.up_proj.weight for block in blocks),
        model.model.norm.weight,
        torch.zeros(LENGTH, model.config.head_dim),  # tables of rotations, which no reader takes
    ]
