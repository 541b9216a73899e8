"""Tiny encoders and sequence classifiers of random weights, with a tokenizer that has pairs of texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
"""Sizes that four devices do not divide."""


def save(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, *, segments: bool = True
) -> PreTrainedModel:
    """A model of random weights, saved with its tokenizer in `folder`; only with `segments` does it read them."""
    model = model_class(copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        # Far from zero, so that every weight matters.
        scale = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(weight, mean=float(scale), std=0.3, generator=generator)
    model.save_pretrained(folder)
    tokenizer(segments).save_pretrained(folder)
    return model


def tokenizer(segments: bool = True) -> PreTrainedTokenizerFast:
    """BERT's: each letter is a token, and a pair is [CLS] a [SEP] b [SEP]."""
    backend = Tokenizer(WordPiece({token: index for index, token in enumerate(VOCAB)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"],
    )  # fmt: skip


def state_pooling(folder: Path, mode: str, *, normalize: bool) -> None:
    """Write what sentence-transformers keeps beside a model; `mode` as in "pooling_mode_mean_tokens"."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": f"x.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = dict.fromkeys(("cls_token", "mean_tokens", "lasttoken", "max_tokens"), False) | {mode: True}
    config = {f"pooling_mode_{name}": on for name, on in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **config}))
