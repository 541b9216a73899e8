"""Our model for lm-eval against lm-eval's own transformers backend, on the tiny Llama in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from tests.trtllm_jax.tiny_engine import LENGTH, tiny_engine
from trtllm_jax import LLM
from trtllm_jax.commands.eval.lm import EngineLM, batches
from trtllm_jax.commands.eval.run import EvalOptions, load_tasks, measure
from trtllm_jax.functional.model import Model
from trtllm_jax.functional.research import open_model

TASKS = (
    "arc_easy", "arc_challenge", "boolq", "openbookqa", "piqa", "winogrande", "lambada_openai", "wikitext", "mmlu",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Model:
    return open_model(tiny_llama)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with tiny_engine(tiny_llama) as llm:
        yield llm


@pytest.fixture(scope="module")
def ours(llm: LLM, model: Model) -> EngineLM:
    # As many tokens at once as two rows of the longest sequence.
    return EngineLM(llm, model, LENGTH, tokens_at_once=2 * LENGTH)


@pytest.fixture(scope="module")
def theirs(tiny_torch: Any, tiny_llama: Path) -> HFLM:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return HFLM(pretrained=tiny_torch, tokenizer=tokenizer, max_length=LENGTH, batch_size=4, backend="causal")


def instances(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def greedy_text(lm: HFLM, prompt: str) -> str:
    """What the model goes on with, as far as it is text that encodes to itself."""
    text: str = lm.generate_until(instances("generate_until", (prompt, {"until": [], "max_gen_toks": 6})))[0]
    return text.split("\ufffd")[0]


class TestLikelihoods:
    def test_equal_the_transformers_backend(self, ours: EngineLM, theirs: HFLM) -> None:
        likely = [prompt for prompt in map(chr, range(33, 127)) if len(greedy_text(theirs, prompt)) > 1][:2]
        assert likely, "no prompt shows a continuation that greedy decoding gives"
        pairs = [
            *((prompt, greedy_text(theirs, prompt)) for prompt in likely),
            ("One two", " three"),
            ("One two", " four"),
            ("One two", " fo"),
            ("A", "B"),
            ("A", "C"),
            ("Ends in a blank ", "word"),
            ("", "No context at all"),
            ("<bos>Begins", " so"),
            ("long " * 60, "cut from the left"),
            ("longer than all" * 20, "x" * LENGTH),
            ("Übergröße ", "über é"),
        ]
        found = ours.loglikelihood(instances("loglikelihood", *pairs))
        expected = theirs.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
        for (context, continuation), (logprob, greedy), (their_logprob, their_greedy) in zip(
            pairs, found, expected, strict=True
        ):
            tokens = len(continuation.encode())
            assert abs(logprob - their_logprob) / tokens < 1e-4, (context[:20], continuation[:20])
            assert greedy == their_greedy, (context[:20], continuation[:20])
        assert [greedy for _, greedy in found][: len(likely)] == [True] * len(likely)
        assert not all(greedy for _, greedy in found)

    def test_of_long_texts_are_in_the_same_windows(self, ours: EngineLM, theirs: HFLM) -> None:
        texts = [("short",), ("word " * 100,), ("x" * LENGTH,), ("y" * (LENGTH + 1),)]
        found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", *texts))
        expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_what_cannot_be_scored_is_said(self, ours: EngineLM) -> None:
        with pytest.raises(ValueError, match="a continuation is empty"):
            ours.loglikelihood(instances("loglikelihood", ("context", "")))
        with pytest.raises(ValueError, match=f"has {LENGTH + 1} tokens and max_seq_len is {LENGTH}"):
            ours.loglikelihood(instances("loglikelihood", ("context", "z" * (LENGTH + 1))))

    @pytest.mark.slow
    @pytest.mark.multi_device
    def test_are_the_same_over_two_devices(self, tiny_llama: Path, model: Model, ours: EngineLM) -> None:
        pairs = instances("loglikelihood", ("One two", " three"), ("One", "!"), ("A", "B"))
        with tiny_engine(tiny_llama, tensor_parallel_size=2) as split:
            found = EngineLM(split, model, LENGTH).loglikelihood(pairs)
        np.testing.assert_allclose(found, ours.loglikelihood(pairs), rtol=1e-5)


class TestBatches:
    @pytest.mark.parametrize("tokens", [1, 64, 512, 4096])
    def test_hold_every_row_once_and_fit(self, tokens: int) -> None:
        rng = np.random.default_rng(tokens)
        rows = {tuple(rng.integers(0, 9, rng.integers(1, 100)).tolist()) for _ in range(50)}
        made = list(batches(rows, tokens, longest=100))
        assert sorted(row for batch in made for row in batch.rows) == sorted(rows)
        for batch in made:
            assert max(map(len, batch.rows)) <= batch.width <= 100
            assert len(batch.rows) <= batch.height
            assert batch.height == 1 or batch.height * batch.width <= tokens


class TestAnswers:
    def test_equal_the_transformers_backend(self, ours: EngineLM, theirs: HFLM) -> None:
        prompts = ["One two", "A", "Question: why?\nAnswer:", "long " * 60]
        free = [(prompt, {"until": [], "max_gen_toks": 16, "do_sample": False}) for prompt in prompts]
        whole = theirs.generate_until(instances("generate_until", *free), disable_tqdm=True)
        assert ours.generate_until(instances("generate_until", *free)) == whole
        # A character of an answer's middle ends it, and a special token may stand among the stops.
        ends = {prompt: [c for c in text[1:-1] if c.isascii()] for prompt, text in zip(prompts, whole, strict=True)}
        stopped = [(prompt, {"until": [c[0], "<eos>"], "max_gen_toks": 16}) for prompt, c in ends.items() if c]
        assert len(stopped) > 1
        expected = theirs.generate_until(instances("generate_until", *stopped), disable_tqdm=True)
        assert ours.generate_until(instances("generate_until", *stopped)) == expected
        assert all(arguments["until"][0] not in text for (_, arguments), text in zip(stopped, expected, strict=True))

    def test_sampling_is_what_the_task_says(self, ours: EngineLM) -> None:
        asked = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
        same = ours.generate_until(instances("generate_until", *[("One", asked)] * 4))
        assert len(set(same)) > 1

    def test_no_room_for_a_prompt(self, ours: EngineLM) -> None:
        with pytest.raises(ValueError, match="leaves no room for a prompt"):
            ours.generate_until(instances("generate_until", ("One", {"until": [], "max_gen_toks": LENGTH})))


@pytest.mark.slow
def test_tasks_have_the_scores_of_the_transformers_backend(ours: EngineLM, theirs: HFLM, eval_files: Path) -> None:
    def scores(lm: Any, options: EvalOptions) -> dict[str, dict[str, Any]]:
        results = measure(lm, load_tasks(options), options)["results"]
        return {
            name: {key: value for key, value in of.items() if "," in key and "stderr" not in key}
            for name, of in results.items()
        }

    for options in (
        EvalOptions(tasks=TASKS, dataset_path=eval_files, num_fewshot=0),
        EvalOptions(tasks=("gsm8k",), dataset_path=eval_files, num_fewshot=1, max_output_length=8),
    ):
        found, expected = scores(ours, options), scores(theirs, options)
        assert found.keys() == expected.keys() >= set(options.tasks)
        for name, metrics in expected.items():
            assert found[name] == pytest.approx(metrics, rel=1e-4), name
