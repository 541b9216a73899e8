"""The text and the ids of answers: with the prompt, with special tokens, up to a stop string."""

from typing import Any

import numpy as np
import pytest

from trtllm_jax import LLM

from .sampled import SPECIAL, VOCAB, free, tokens_of


class TestInputInOutput:
    @pytest.mark.parametrize("edits", [{}, {"repetition_penalty": 1.2, "logprobs": 1}])
    def test_ids_and_text_begin_with_the_prompt(self, llm: LLM, edits: dict[str, Any]) -> None:
        bare = llm.generate("Hello", free(**edits)).outputs[0]
        full = llm.generate("Hello", free(exclude_input_from_output=False, **edits))
        sample = full.outputs[0]
        assert sample.token_ids == full.prompt_token_ids + bare.token_ids
        assert sample.text == "Hello" + bare.text
        assert (sample.length, sample.logprobs) == (20, bare.logprobs)

    def test_a_stream_adds_what_was_generated(self, llm: LLM) -> None:
        bare = llm.generate("Hello", free()).outputs[0]
        text, tokens = "", []
        for output in llm.generate("Hello", free(exclude_input_from_output=False), streaming=True):
            text += output.outputs[0].text_diff
            tokens += output.outputs[0].token_ids_diff
            assert output.outputs[0].text == "Hello" + text
        assert (text, tokens) == (bare.text, bare.token_ids)

    @pytest.mark.parametrize(
        ("prompt", "arguments", "text"),
        [
            (list(b"abc"), {}, None),
            ("abcdef", {"truncate_prompt_tokens": 2}, "ef"),
            ("abc", {"detokenize": False}, ""),
            ([*b"abc"], {"detokenize": False}, ""),
        ],
    )
    def test_the_text_is_that_of_the_ids(
        self, llm: LLM, prompt: Any, arguments: dict[str, Any], text: str | None
    ) -> None:
        output = llm.generate(prompt, free(exclude_input_from_output=False, n=2, temperature=1.0, seed=1, **arguments))
        assert llm.tokenizer is not None
        begins = llm.tokenizer.decode(output.prompt_token_ids) if text is None else text
        for sample in output.outputs:
            assert sample.text.startswith(begins)
            assert sample.token_ids[: len(output.prompt_token_ids)] == output.prompt_token_ids
            assert sample.length == 20
        assert bool(output.outputs[0].text) == arguments.get("detokenize", True)


class TestText:
    def test_what_concerns_beams_and_padding_changes_nothing(self, llm: LLM) -> None:
        more = {"length_penalty": 2.0, "pad_id": 3, "spaces_between_special_tokens": False}
        assert tokens_of(llm, "a", **more) == tokens_of(llm, "a")

    @pytest.mark.parametrize("skip", [True, False])
    def test_special_tokens_in_the_text(self, llm: LLM, skip: bool) -> None:
        assert llm.tokenizer is not None
        assert SPECIAL in llm.tokenizer.hf.all_special_ids
        only = np.full(VOCAB, -np.inf)
        only[SPECIAL] = 0
        output = llm.generate("a", free(embedding_bias=only, max_tokens=4, skip_special_tokens=skip)).outputs[0]
        assert output.token_ids == [SPECIAL] * 4
        assert output.text == ("" if skip else llm.tokenizer.decode([SPECIAL], skip_special_tokens=False) * 4)

    @pytest.mark.parametrize("include", [True, False])
    def test_a_stop_string_of_edited_text(self, llm: LLM, include: bool) -> None:
        params = free(max_tokens=60, repetition_penalty=1.2)
        whole = llm.generate("go", params).outputs[0]
        stop = whole.text[20:23]
        params = free(max_tokens=60, repetition_penalty=1.2, stop=stop, include_stop_str_in_output=include)
        output = llm.generate("go", params).outputs[0]
        end = whole.text.index(stop) + (len(stop) if include else 0)
        assert output.text == whole.text[:end]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
