"""Texts that are computed whole: embeddings, classes and scores through an engine, against transformers."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from trtllm_jax import LLM, EngineDeadError, SamplingParams
from trtllm_jax.engine import device_memory
from trtllm_jax.engine.programs import Programs
from trtllm_jax.engine.runner import Runner
from trtllm_jax.llmapi import loading
from trtllm_jax.llmapi.llm_args import parse_llm_args
from trtllm_jax.remote.host import EngineHost
from trtllm_jax.remote.llm import RemoteLLM

from ..tiny_encoders import SIZES, save, state_pooling, tokenizer
from ..tiny_engine import held, tiny_engine

ENGINE: dict[str, Any] = {"dtype": "float32", "max_batch_size": 4, "max_num_tokens": 64, "enforce_eager": True}
TEXTS = ["a", "several words of one text", "more", "the quick brown fox jumps over it", "and so on", "x y z", "abc"]
PAIRS = [("where is it", "it is here"), ("a", "b"), ("who was that", "nobody knows of him"), ("one", "two three")]

Embed = Callable[[Sequence[str]], np.ndarray]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bert")


@pytest.fixture(scope="module")
def bert(bert_folder: Path) -> PreTrainedModel:
    return save(BertModel, BertConfig(**SIZES), bert_folder)


@pytest.fixture(scope="module")
def llm(bert: PreTrainedModel, bert_folder: Path) -> Iterator[LLM]:
    with LLM(bert_folder, **ENGINE) as llm:
        yield llm


@torch.no_grad()
def hidden_states(model: PreTrainedModel, text: str) -> np.ndarray:
    states: np.ndarray = model(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0].numpy()
    return states


@torch.no_grad()
def class_logits(model: PreTrainedModel, *texts: str, **how: Any) -> np.ndarray:
    logits: np.ndarray = model(**tokenizer()(*texts, return_tensors="pt", **how)).logits[0].numpy()
    return logits


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


class TestEmbeddings:
    def test_are_the_means_of_hidden_states(self, llm: LLM, bert: PreTrainedModel) -> None:
        """More texts than a step has rows, of lengths that take different programs."""
        outputs = llm.embed(TEXTS)
        for text, output in zip(TEXTS, outputs, strict=True):
            np.testing.assert_allclose(output.embedding, unit(hidden_states(bert, text).mean(0)), atol=1e-5)
            assert output.prompt_token_ids == tokenizer()(text).input_ids
            assert output.finished
            assert output.outputs[0].token_ids == []
            assert output.metrics_dict["request_queue_time"] >= 0

    def test_as_long_as_the_model_allows(self, llm: LLM, bert: PreTrainedModel) -> None:
        longest = " ".join("abcdefghij" for _ in range(6)) + " ab"
        assert len(tokenizer()(longest).input_ids) == 64
        found = llm.embed(longest).embedding
        np.testing.assert_allclose(found, unit(hidden_states(bert, longest).mean(0)), atol=1e-5)
        with pytest.raises(ValueError, match=r"the text has 65 tokens and max_seq_len is 64"):
            llm.embed(longest + "c")

    def test_of_a_text_that_is_cut(self, llm: LLM) -> None:
        text = TEXTS[3]
        wanted = tokenizer()(text, truncation=True, max_length=9).input_ids
        output = llm.embed(text, truncate_prompt_tokens=9)
        assert output.prompt_token_ids == wanted
        np.testing.assert_allclose(output.embedding, llm.embed(wanted).embedding, atol=1e-6)

    @pytest.mark.parametrize(("mode", "row"), [("cls_token", 0), ("lasttoken", -1)])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_as_a_folder_states_them(
        self, bert: PreTrainedModel, tmp_path: Path, mode: str, row: int, normalize: bool
    ) -> None:
        save(BertModel, BertConfig(**SIZES), tmp_path)
        state_pooling(tmp_path, mode, normalize=normalize)
        with LLM(tmp_path, **ENGINE) as llm:
            state = hidden_states(bert, TEXTS[1])[row]
            wanted = unit(state) if normalize else state
            np.testing.assert_allclose(llm.embed(TEXTS[1]).embedding, wanted, atol=1e-4)

    @pytest.mark.parametrize(("mode", "normalize"), [("lasttoken", False), ("mean_tokens", True), ("cls_token", False)])
    def test_of_a_decoder_as_its_folder_states_them(
        self, tiny_llama: Path, tmp_path: Path, mode: str, normalize: bool
    ) -> None:
        folder = Path(shutil.copytree(tiny_llama, tmp_path / "decoder"))
        state_pooling(folder, mode, normalize=normalize)
        ids = [5, 9, 6, 7]
        with torch.no_grad():
            states = AutoModel.from_pretrained(tiny_llama)(torch.tensor([ids])).last_hidden_state[0].numpy()
        state = {"lasttoken": states[-1], "mean_tokens": states.mean(0), "cls_token": states[0]}[mode]
        with LLM(folder, max_seq_len=64, kv_cache_config={"max_tokens": 128}, **ENGINE) as llm:
            found = llm.embed(ids).embedding
            np.testing.assert_allclose(found, unit(state) if normalize else state, atol=1e-4)
            assert llm.facts.task == ("generate" if mode == "lasttoken" else "embed")
            assert llm.score("a", "a") == pytest.approx([1], abs=1e-5)  # whatever the norms

    @pytest.mark.multi_device(2)
    def test_on_two_devices(self, llm: LLM, bert_folder: Path) -> None:
        with LLM(bert_folder, tensor_parallel_size=2, **ENGINE) as split:
            for one, other in zip(llm.embed(TEXTS), split.embed(TEXTS), strict=True):
                np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)

    def test_of_a_decoder_without_a_head(self, tmp_path: Path) -> None:
        """As e5-mistral is published: the bare name, and names of tensors without a prefix."""
        reference = save(MistralModel, MistralConfig(**SIZES, num_key_value_heads=3), tmp_path, segments=False)
        state_pooling(tmp_path, "lasttoken", normalize=True)
        with LLM(tmp_path, **ENGINE) as llm:
            for text, found in zip(TEXTS, llm.embed(TEXTS), strict=True):
                np.testing.assert_allclose(found.embedding, unit(hidden_states(reference, text)[-1]), atol=1e-5)
            with pytest.raises(ValueError, match=r"computes texts whole and generates none: use LLM\.embed"):
                llm.generate("a")

    def test_the_head_of_a_decoder_by_its_bare_name_is_not_read(self, tiny_llama: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
        stated = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(stated | {"architectures": ["LlamaModel"]}))
        with LLM(tmp_path, max_seq_len=64, **ENGINE) as bare, tiny_engine(tiny_llama) as whole:
            np.testing.assert_allclose(bare.embed("a b").embedding, whole.embed("a b").embedding, atol=2e-5)

    def test_of_a_decoder_without_a_cache(self, tiny_llama: Path) -> None:
        with tiny_engine(tiny_llama) as cached, LLM(tiny_llama, encode_only=True, max_seq_len=64, **ENGINE) as whole:
            for one, other in zip(cached.embed(TEXTS), whole.embed(TEXTS), strict=True):
                np.testing.assert_allclose(one.embedding, other.embedding, atol=2e-5)
            with pytest.raises(ValueError, match=r"computes texts whole and generates none: use LLM\.embed"):
                whole.generate("a")
            assert whole.get_kv_cache_capacity()["maxNumTokens"] == 0


@pytest.mark.parametrize("encode_only", [True, False])
def test_arguments_that_mean_nothing_to_whole_texts_are_warned_about_by_name(
    bert: PreTrainedModel, bert_folder: Path, tiny_llama: Path, encode_only: bool, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {
        "kv_cache_config": {"max_tokens": 64},
        "scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"},
        "batched_logits_processor": print,
        "build_config": {"max_beam_width": 2},
        "enable_chunked_prefill": True,
        "stream_interval": 2,
        "chat_template": "{{ messages }}",
        "allow_request_chat_template": True,
    }
    how = {"load_format": "dummy", "max_seq_len": 64, "gather_generation_logits": False, **given}
    folder, whole = (tiny_llama, {"encode_only": True}) if encode_only else (bert_folder, {})
    loading.load(parse_llm_args(model=folder, **whole, **how))
    warned = [record.getMessage().split(" = ")[0] for record in caplog.records if "has no effect" in record.message]
    assert sorted(warned) == sorted(f"LLM.{name}" for name in {*given, "max_beam_width"} - {"build_config"})
    caplog.clear()
    loading.load(parse_llm_args(model=tiny_llama, **how))
    assert "has no effect: this model computes texts whole" not in caplog.text


SCORES = 2 * 6 * 64 * 64 * 4
"""Bytes of a text of 64 tokens: two arrays of the scores of six heads in float32."""


def test_a_text_that_the_memory_does_not_hold_is_refused_before_anything_compiles(
    bert: PreTrainedModel, bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_anything(*_: Any) -> None:
        raise AssertionError("a program was compiled")

    monkeypatch.setattr(Programs, "compile", compile_anything)
    monkeypatch.setattr(device_memory, "of_host", lambda: SCORES - 1)
    with pytest.raises(MemoryError, match=r"max_seq_len=64 needs .* GiB are there: lower max_seq_len"):
        LLM(bert_folder, max_seq_len=64, **ENGINE)
    with pytest.raises(AssertionError):
        LLM(bert_folder, max_seq_len=32, **ENGINE)


def test_the_longest_text_is_as_long_as_the_memory_holds_where_none_is_asked_for(
    llm: LLM, bert_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_memory, "of_host", lambda: SCORES - 1)
    with LLM(bert_folder, **ENGINE) as bounded:
        assert bounded._engine.limits.max_seq_len == 32
        assert "max_seq_len is 32, because the memory holds no whole text of the model's 64 tokens" in caplog.text
        np.testing.assert_allclose(bounded.embed("a b").embedding, llm.embed("a b").embedding, atol=1e-5)


def test_steps_have_no_more_long_texts_than_the_memory_holds(
    llm: LLM, bert_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_memory, "of_host", lambda: 3 * SCORES)
    with LLM(bert_folder, **ENGINE | {"max_num_tokens": 256}) as bounded:
        assert bounded._engine.limits.max_num_tokens == 3 * 64
        assert "max_num_tokens = 256 is lowered to 192" in caplog.text
        for one, other in zip(llm.embed(TEXTS), bounded.embed(TEXTS), strict=True):
            np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-5)


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classes")


@pytest.fixture(scope="module")
def reference(class_folder: Path) -> PreTrainedModel:
    return save(BertForSequenceClassification, BertConfig(**SIZES, num_labels=3), class_folder)


@pytest.fixture(scope="module")
def classifier(reference: PreTrainedModel, class_folder: Path) -> Iterator[LLM]:
    with LLM(class_folder, **ENGINE) as llm:
        yield llm


class TestClasses:
    def test_of_texts_and_pairs(self, classifier: LLM, reference: PreTrainedModel) -> None:
        outputs = classifier.encode(TEXTS + [{"prompt": first, "text_pair": second} for first, second in PAIRS])
        wanted = [class_logits(reference, text) for text in TEXTS] + [class_logits(reference, *pair) for pair in PAIRS]
        for output, exact in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(output.logits, exact, atol=1e-4)
        assert outputs[0].prompt == TEXTS[0]
        assert outputs[-1].prompt_token_ids == tokenizer()(*PAIRS[-1]).input_ids

    @pytest.mark.parametrize("most", [3, 5, 8, 11])
    def test_of_a_pair_that_is_cut(self, classifier: LLM, reference: PreTrainedModel, most: int) -> None:
        for first, second in (*PAIRS, PAIRS[2][::-1]):
            cut = {"truncation": "longest_first", "max_length": most}
            output = classifier.encode({"prompt": first, "text_pair": second}, truncate_prompt_tokens=most)
            assert output.prompt_token_ids == tokenizer()(first, second, **cut).input_ids
            np.testing.assert_allclose(output.logits, class_logits(reference, first, second, **cut), atol=1e-4)

    def test_of_ids_with_their_segments(self, classifier: LLM, reference: PreTrainedModel) -> None:
        encoded = tokenizer()(*PAIRS[0])
        prompt = {"prompt_token_ids": encoded.input_ids, "token_type_ids": encoded.token_type_ids}
        np.testing.assert_allclose(classifier.encode(prompt).logits, class_logits(reference, *PAIRS[0]), atol=1e-4)

        first = {name: ids[:12] for name, ids in prompt.items()}
        cut = classifier.encode(prompt, truncate_prompt_tokens=12)
        assert cut.prompt_token_ids == first["prompt_token_ids"]
        np.testing.assert_allclose(cut.logits, classifier.encode(first).logits, atol=1e-6)

    def test_over_a_connection(self, classifier: LLM) -> None:
        """As where several frontends share an engine."""
        prompts = [*TEXTS, *({"prompt": first, "text_pair": second} for first, second in PAIRS)]
        here, there = socket.socketpair()
        host = EngineHost(classifier, max_queue_size=100)
        host.connect(there)
        remote = RemoteLLM(here, classifier.args)
        try:
            for one, other in zip(remote.encode(prompts), classifier.encode(prompts), strict=True):
                np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
        finally:
            remote.shutdown()
            host.close()

    def test_what_has_no_answer_is_refused(self, classifier: LLM, llm: LLM) -> None:
        with pytest.raises(ValueError, match=r"is a sequence classifier and has no embeddings: use LLM\.encode"):
            classifier.embed("a")
        with pytest.raises(ValueError, match=r"generates none: use LLM\.encode"):
            classifier.generate("a")
        with pytest.raises(ValueError, match=r"model has 3 classes, and a score needs a classifier of one"):
            classifier.score("a", "b")
        with pytest.raises(RuntimeError, match=r"encode needs a sequence classifier, and this model has no classes"):
            llm.encode("a")
        with pytest.raises(ValueError, match=r"token_type_ids must be a list of 0 or 1, one for each"):
            classifier.encode({"prompt_token_ids": [5, 6], "token_type_ids": [0]})
        with pytest.raises(ValueError, match=r"token_type_ids goes with prompt_token_ids; a pair of texts has"):
            classifier.encode({"prompt": "a", "token_type_ids": [1, 1, 1]})
        with pytest.raises(ValueError, match=r"text_pair goes with a text; a pair that is given as ids has"):
            classifier.encode({"prompt_token_ids": [5, 6], "text_pair": "a"})
        with pytest.raises(ValueError, match=r"truncate_prompt_tokens = 2 has no room for the 3 special tokens"):
            classifier.encode({"prompt": "a", "text_pair": "b"}, truncate_prompt_tokens=2)
        with pytest.raises(ValueError, match=r"the prompt '' has no tokens; give some text"):
            classifier.encode("", add_special_tokens=False)
        with pytest.raises(TypeError, match=r"text_pair must be a str; got int"):
            classifier.encode({"prompt": "a", "text_pair": 3})
        with pytest.raises(ValueError, match=r"a prompt dict holds cache_salt; supported here: prompt, text_pair"):
            classifier.encode({"prompt": "a", "cache_salt": "b"})


class TestScores:
    @pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
    def test_of_a_cross_encoder(self, tmp_path: Path, activation: str | None) -> None:
        config = XLMRobertaConfig(**SIZES, num_labels=1)
        if activation:
            config.sentence_transformers = {"activation_fn": activation}
        reference = save(XLMRobertaForSequenceClassification, config, tmp_path, segments=False)

        with torch.no_grad():
            encoded = [tokenizer(segments=False)(*pair, return_tensors="pt") for pair in PAIRS]
            exact = np.array([reference(**inputs).logits.item() for inputs in encoded])
        with LLM(tmp_path, **ENGINE) as llm:
            found = llm.score([first for first, _ in PAIRS], [second for _, second in PAIRS])
            np.testing.assert_allclose(found, exact if activation else 1 / (1 + np.exp(-exact)), rtol=1e-3, atol=1e-5)
            shared = llm.score(PAIRS[0][0], [PAIRS[0][1], "else"])
            assert shared[0] == pytest.approx(found[0], rel=1e-4)

    def test_of_embeddings_are_cosines(self, llm: LLM, bert: PreTrainedModel) -> None:
        vectors = [unit(hidden_states(bert, text).mean(0)) for text in TEXTS]
        np.testing.assert_allclose(
            llm.score(TEXTS[0], TEXTS[1:3]), [vectors[0] @ vectors[i] for i in (1, 2)], atol=1e-5
        )
        found = llm.score(TEXTS[:2], TEXTS[2:4])
        np.testing.assert_allclose(found, [vectors[i] @ vectors[i + 2] for i in (0, 1)], atol=1e-5)

    def test_of_texts_that_are_cut(self, llm: LLM) -> None:
        assert llm.score("abc", "abcdefgh", truncate_prompt_tokens=5) == pytest.approx([1], abs=1e-5)

    def test_of_unequal_numbers_are_refused(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match=r"there are 2 first texts and 3 second ones: give one first text"):
            llm.score(["a", "b"], ["a", "b", "c"])
        with pytest.raises(ValueError, match=r"there are 1 first texts and 0 second ones"):
            llm.score("a", [])
        with pytest.raises(TypeError, match=r"score takes texts"):
            llm.score([[1, 2]], ["a"])


class TestTheEngine:
    def test_a_text_that_is_aborted_leaves_the_others(self, llm: LLM, bert: PreTrainedModel) -> None:
        with held(llm) as resume:
            going = [llm.embed_async(text) for text in TEXTS]
            for index in (0, 5):
                going[index].abort()
            time.sleep(0.05)
            resume.set()
        assert [output.result().outputs[0].finish_reason for output in going] == [
            "cancelled" if index in (0, 5) else "stop" for index in range(len(TEXTS))
        ]
        np.testing.assert_allclose(going[3].embedding, unit(hidden_states(bert, TEXTS[3]).mean(0)), atol=1e-5)
        assert going[6].metrics_dict["request_queue_time"] >= 0.05

    def test_other_weights_give_other_embeddings(self, bert_folder: Path, bert: PreTrainedModel) -> None:
        import jax

        with LLM(bert_folder, **ENGINE) as llm:
            before = llm.embed(TEXTS[1]).embedding
            llm.update_weights(jax.tree.map(lambda array: array * 0.5, llm.params))
            after = llm.embed(TEXTS[1]).embedding
            assert np.abs(before - after).max() > 1e-2

    def test_its_failure_reaches_every_waiter(
        self, bert_folder: Path, bert: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with LLM(bert_folder, **ENGINE) as llm:

            def fail(self: Runner, dispatches: Any) -> Any:
                raise OSError("gone")

            monkeypatch.setattr(Runner, "run", fail)
            with held(llm) as resume:  # lest the engine fail before the last one is submitted
                going = [llm.embed_async(text) for text in TEXTS]
                resume.set()
            for output in going:
                with pytest.raises(EngineDeadError):
                    output.result(60)

    @pytest.mark.parametrize(
        "ask",
        [lambda llm: llm.encode(TEXTS), lambda llm: llm.encode("a"), lambda llm: llm.score("a", TEXTS)],
        ids=["a list", "one", "scores"],
    )
    def test_a_shutdown_leaves_no_answer_out(
        self, reference: PreTrainedModel, class_folder: Path, ask: Callable[[LLM], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with LLM(class_folder, **ENGINE) as llm, held(llm) as resume, ThreadPoolExecutor(2) as pool:
            monkeypatch.setattr(llm.builder, "facts", replace(llm.facts, class_names=("only",)))
            asked = pool.submit(ask, llm)
            wait_until(lambda: bool(llm._engine._scheduler.running))  # it reads no command before it is resumed
            ended = pool.submit(llm.shutdown)
            wait_until(lambda: llm._engine._commands.qsize() > 0)
            resume.set()
            with pytest.raises(RuntimeError, match="LLM is shutting down"):
                asked.result(60)
            ended.result(60)

    def test_statistics_count_texts(self, llm: LLM) -> None:
        llm.get_stats()
        llm.embed(TEXTS)
        stats = [record["inflightBatchingStats"] for record in llm.get_stats()]
        assert sum(record["numContextRequests"] for record in stats) == len(TEXTS)
        assert sum(record["numCtxTokens"] for record in stats) == sum(
            len(tokenizer()(text).input_ids) for text in TEXTS
        )
        assert len(stats) < len(TEXTS)

    def test_a_parameter_for_generation_is_no_help(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match=r"generates none: use LLM\.embed"):
            llm.generate("a", SamplingParams(max_tokens=3))
