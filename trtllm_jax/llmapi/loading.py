"""Loads what the arguments of an `LLM` name: a model, its weights on the devices, a tokenizer."""

from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

import sharding
from checkpoints.classes import class_activation, class_names
from checkpoints.sentence_transformers import score_activation
from trtllm_jax.functional.loading import load_weights
from trtllm_jax.functional.model import Model
from trtllm_jax.functional.research import open_model
from trtllm_jax.llmapi.llm_args import LlmArgs, warn_of_unread
from trtllm_jax.text.tokenizer import Tokenizer
from trtllm_jax.text.tokenizer_loading import load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for an engine.

    Attributes:
        model: the model's pure functions.
        params: the weights on the mesh.
        mesh: the devices.
        tokenizer: None with skip_tokenizer_init=True.
        end_ids: the ids that end a sequence, from the generation config and the tokenizer.
        model_type: config.json's "model_type"; "" if it has none.
        class_names: the names of a classifier's classes.
        class_activation: what makes probabilities of a classifier's logits.
        score_activation: what makes a cross-encoder's logit a score.
    """

    model: Model
    params: Any
    mesh: Mesh
    tokenizer: Tokenizer | None
    end_ids: frozenset[int]
    model_type: str
    class_names: tuple[str, ...]
    class_activation: str
    score_activation: str


def load(args: LlmArgs) -> LoadedModel:
    """Load everything that `args` names. Configuration and lengths are checked before any weight is read."""
    model = open_model(args.model, revision=args.revision)
    if args.max_seq_len is not None and args.max_seq_len > model.config.max_position:
        raise ValueError(
            f"LLM.max_seq_len = {args.max_seq_len} exceeds the {model.config.max_position} positions of the model: use "
            "at most that many, or leave it out"
        )
    if args.encode_only or not model.cache_groups:
        warn_of_unread(args)
    mesh = sharding.make_mesh(args.tensor_parallel_size)
    tokenizer = None
    if not args.skip_tokenizer_init:
        tokenizer = load_tokenizer(model.files, args.tokenizer, args.tokenizer_mode, args.tokenizer_revision)
    with model.files.named_in_errors():
        of_classes = class_activation(model.files.config, model.labels)
        of_scores = score_activation(model.files.config, model.labels)
    ends = model.end_ids | frozenset(tokenizer.eos_ids if tokenizer else ())
    params = load_weights(model, mesh, dtype=args.dtype, load_format=args.load_format)
    return LoadedModel(
        # No file stays open while an engine runs.
        model=replace(model, checkpoint=None, encode_only=model.encode_only or args.encode_only),
        params=params,
        mesh=mesh,
        tokenizer=tokenizer,
        # An id outside the vocabulary is never drawn, and logit edits such as min_tokens could not index it.
        end_ids=frozenset(token for token in ends if token < model.config.vocab),
        model_type=str(model.files.config.get("model_type") or ""),
        # Only now, because a hostile count of classes has no weights.
        class_names=class_names(model.files.config, model.labels),
        class_activation=of_classes,
        score_activation=of_scores,
    )
