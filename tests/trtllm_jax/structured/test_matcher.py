"""Masks of several matchers at once, against what each allows by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.checkpoint import open_checkpoint
from trtllm_jax import SamplingParams
from trtllm_jax.engine.logit_edits import LogitEdits
from trtllm_jax.engine.plan import StepPlan
from trtllm_jax.engine.request import Request
from trtllm_jax.engine.step_edits import advance_matchers, step_edits
from trtllm_jax.engine.step_output import StepOutput
from trtllm_jax.llmapi import GuidedDecodingParams
from trtllm_jax.structured.matcher import GrammarCompiler, LLGuidanceMatcher
from trtllm_jax.text.tokenizer import Tokenizer

EOS = 256
PATTERNS = {"[a-c]+": "abc", "[0-9]": "0123456789", "(yes|no)": "yn"}


@pytest.fixture(scope="module")
def compiler(tiny_llama: Path) -> GrammarCompiler:
    hf = open_checkpoint(tiny_llama).load_tokenizer(None, "auto", None)
    return GrammarCompiler(Tokenizer(hf), 258, [EOS])


def begun(compiler: GrammarCompiler, pattern: str) -> LLGuidanceMatcher:
    return compiler.start(GuidedDecodingParams(regex=pattern).constraint())


def ids_of(words: np.ndarray) -> list[list[int]]:
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits]


@pytest.mark.parametrize("vocab", [257, 258, 288, 300, 128])
def test_each_allows_its_own(compiler: GrammarCompiler, vocab: int) -> None:
    words, failures = LLGuidanceMatcher.allowed_words([begun(compiler, pattern) for pattern in PATTERNS], vocab)
    assert failures == {}
    assert words.shape == (3, -(-vocab // 32))
    alone = [LLGuidanceMatcher.allowed_words([begun(compiler, pattern)], vocab)[0][0] for pattern in PATTERNS]
    np.testing.assert_array_equal(words, alone)
    sizes = [len(letters) for letters in PATTERNS.values()]
    assert [len(ids) for ids in ids_of(words)] == sizes
    assert max(max(ids) for ids in ids_of(words)) < vocab


def test_where_nothing_is_left_the_others_go_on(compiler: GrammarCompiler) -> None:
    words, failures = LLGuidanceMatcher.allowed_words(
        [begun(compiler, pattern) for pattern in ("[a-c]", "z", "[0-9]")], 80
    )
    assert list(failures) == [1]
    assert "cannot be followed" in str(failures[1])
    assert (words[1] == -1).all()
    assert [len(ids) for ids in ids_of(words)] == [3, 96, 10]


class Broken(LLGuidanceMatcher):
    """As if the library itself failed for it."""

    @property
    def _matcher(self) -> Any:
        raise RuntimeError("poisoned")

    @_matcher.setter
    def _matcher(self, value: Any) -> None:
        pass


def test_a_matcher_that_breaks_fails_its_own_sequence_only(compiler: GrammarCompiler) -> None:
    rows = [begun(compiler, "[a-c]"), Broken(None, 258), begun(compiler, "[0-9]")]
    requests = [
        Request([1], 4, SamplingParams().resolved(), matcher=matcher, edits=LogitEdits(constraint="x"))
        for matcher in rows
    ]
    plan = StepPlan("step", tuple(requests), np.arange(3), emits=np.ones(3, bool), context=np.zeros(3, bool))
    (changes,) = step_edits(plan, 258, 1 << 14)
    assert list(changes.failures) == [1]
    assert [len(ids) for ids in ids_of(changes.allowed)] == [3, 288, 10]
    tokens = [[ids_of(changes.allowed)[0][0]], [0], [200]]
    output = StepOutput(tokens, failures=dict(changes.failures))
    advance_matchers(plan, output)
    assert (sorted(output.failures), str(output.failures[1])) == ([1, 2], "poisoned")
