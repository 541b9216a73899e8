"""Scores of pairs of texts: a cross-encoder's, else the cosine of their embeddings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm_jax.requests.activations import ACTIVATIONS
from trtllm_jax.requests.builder import EngineFacts
from trtllm_jax.requests.outputs import RequestOutput, vectors_of


class PairScoring:
    """The prompts from which the scores of pairs follow.

    Args:
        facts: what the engine does with prompts.
        queries: the first text of each pair, or one for all.
        texts: the second text of each pair.

    ValueError: there are neither as many first texts as second ones, nor one; or the model has several classes.
    """

    def __init__(self, facts: EngineFacts, queries: Sequence[str], texts: Sequence[str]) -> None:
        if len(queries) not in (1, len(texts)) or not texts:
            raise ValueError(
                f"there are {len(queries)} first texts and {len(texts)} second ones: give one first text, or as many "
                "as second ones"
            )
        classes = len(facts.class_names)
        if facts.task == "classify" and classes != 1:
            raise ValueError(f"model has {classes} classes, and a score needs a classifier of one: use encode")
        self._facts = facts
        self._shared = len(queries) == 1
        self.prompts: list[Any]
        self.texts_of: list[tuple[int | None, int | None]]
        """For each prompt the index of the first and of the second text that it has; None where it has none."""
        if facts.task == "classify":
            firsts = list(queries) * (len(texts) if self._shared else 1)
            self.prompts = [{"prompt": a, "text_pair": b} for a, b in zip(firsts, texts, strict=True)]
            self.texts_of = [(0 if self._shared else index, index) for index in range(len(texts))]
        else:
            self.prompts = [*queries, *texts]
            self.texts_of = [*((i, None) for i in range(len(queries))), *((None, i) for i in range(len(texts)))]

    def scores(self, outputs: Sequence[RequestOutput]) -> list[float]:
        """The score of each pair, from the finished outputs of the prompts. RuntimeError where one was cancelled."""
        vectors = np.stack(vectors_of(outputs))
        if self._facts.task != "classify":
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            firsts = vectors[:1] if self._shared else vectors[: len(vectors) // 2]
            return [float(each) for each in (firsts * vectors[len(firsts) :]).sum(1)]
        logits = vectors[:, 0].astype(np.float64)
        return [float(each) for each in ACTIVATIONS[self._facts.score_activation](logits)]
