"""/v1/score, /v1/rerank, /v1/classify and /v1/embeddings of models that compute texts whole, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError, OpenAI
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TextClassificationPipeline

from trtllm_jax import LLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings

from ..tiny_encoders import SIZES, save, tokenizer

QUERY = "who is it"
DOCUMENTS = ["it is he", "nobody", "a fox jumps", "what", "it was the one that is here"]
Served = Callable[[Any], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cross_encoder")


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return save(BertForSequenceClassification, BertConfig(**SIZES, num_labels=1), folder)


@pytest.fixture(scope="module")
def reranker(reference: PreTrainedModel, folder: Path, served: Served) -> Iterator[str]:
    settings = ServeSettings(model_names=("reranker",))
    with (
        LLM(folder, dtype="float32", max_batch_size=4, max_num_tokens=64) as llm,
        served(create_app(llm, settings)) as url,
    ):
        yield url


@torch.no_grad()
def expected(reference: PreTrainedModel, query: str, document: str, **how: Any) -> float:
    return torch.sigmoid(reference(**tokenizer()(query, document, return_tensors="pt", **how)).logits).item()


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={"model": "reranker", **body}, timeout=60)


def test_documents_come_best_first(reranker: str, reference: PreTrainedModel) -> None:
    wanted = [expected(reference, QUERY, document) for document in DOCUMENTS]
    answer = post(reranker, "/v1/rerank", query=QUERY, documents=DOCUMENTS).json()
    order = [result["index"] for result in answer["results"]]
    assert order == sorted(range(len(wanted)), key=lambda index: -wanted[index])
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(wanted[result["index"]], abs=1e-4)
        assert result["document"]["text"] == DOCUMENTS[result["index"]]
    tokens = sum(len(tokenizer()(QUERY, document).input_ids) for document in DOCUMENTS)
    assert answer["usage"]["total_tokens"] == tokens


def test_as_many_as_wanted_and_without_their_texts(reranker: str) -> None:
    every = post(reranker, "/v1/rerank", query=QUERY, documents=DOCUMENTS).json()["results"]
    some = post(reranker, "/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=False).json()
    assert [one["index"] for one in some["results"]] == [one["index"] for one in every[:2]]
    assert all(one.keys() == {"index", "relevance_score"} for one in some["results"])


def test_pairs_are_scored_in_order(reranker: str, reference: PreTrainedModel) -> None:
    for queries in (QUERY, [QUERY] * len(DOCUMENTS)):
        answer = post(reranker, "/v1/score", text_1=queries, text_2=DOCUMENTS).json()
        assert [one["index"] for one in answer["data"]] == list(range(len(DOCUMENTS)))
        wanted = [expected(reference, QUERY, document) for document in DOCUMENTS]
        np.testing.assert_allclose([one["score"] for one in answer["data"]], wanted, atol=1e-4)


def test_pairs_are_cut(reranker: str, reference: PreTrainedModel) -> None:
    answer = post(reranker, "/v1/score", text_1=QUERY, text_2=DOCUMENTS[4], truncate_prompt_tokens=12).json()
    wanted = expected(reference, QUERY, DOCUMENTS[4], truncation="longest_first", max_length=12)
    assert answer["data"][0]["score"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("names", [("entailment", "neutral", "contradiction"), None])
def test_classes_are_those_of_transformers_pipeline(
    tmp_path: Path, served: Served, problem: str | None, names: tuple[str, ...] | None
) -> None:
    classes = {"id2label": dict(enumerate(names))} if names else {"num_labels": 3}
    reference = save(BertForSequenceClassification, BertConfig(**SIZES, **classes, problem_type=problem), tmp_path)
    wanted = TextClassificationPipeline(model=reference, tokenizer=tokenizer(), device="cpu")(DOCUMENTS, top_k=None)
    settings = ServeSettings(model_names=("classifier",))
    with (
        LLM(tmp_path, dtype="float32", max_batch_size=4, max_num_tokens=64, enforce_eager=True) as llm,
        served(create_app(llm, settings)) as url,
    ):
        answer = post(url, "/v1/classify", model="classifier", input=DOCUMENTS).json()
        alone = post(url, "/v1/classify", model="classifier", input=DOCUMENTS[2]).json()
    assert (answer["object"], answer["model"]) == ("list", "classifier")
    assert answer["id"].startswith("classify-")
    assert [one["index"] for one in answer["data"]] == list(range(len(DOCUMENTS)))
    for one, best_first in zip(answer["data"], wanted, strict=True):
        assert one["label"] == best_first[0]["label"]
        assert one["num_classes"] == len(best_first) == 3
        by_label = dict(zip(names or ("LABEL_0", "LABEL_1", "LABEL_2"), one["probs"], strict=True))
        assert by_label == pytest.approx({entry["label"]: entry["score"] for entry in best_first}, abs=1e-4)
    tokens = sum(len(tokenizer()(document).input_ids) for document in DOCUMENTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [one["index"] for one in alone["data"]] == [0]
    assert alone["data"][0]["probs"] == pytest.approx(answer["data"][2]["probs"], abs=1e-5)


@torch.no_grad()
def test_the_only_class_has_the_probability_of_a_sigmoid(reranker: str, reference: PreTrainedModel) -> None:
    cut = tokenizer()(DOCUMENTS[4], return_tensors="pt", truncation=True, max_length=9)
    answer = post(reranker, "/v1/classify", input=DOCUMENTS[4], truncate_prompt_tokens=9).json()
    (only,) = answer["data"]
    assert (only["label"], only["num_classes"]) == ("LABEL_0", 1)
    assert only["probs"] == pytest.approx([torch.sigmoid(reference(**cut).logits).item()], abs=1e-4)
    assert answer["usage"]["total_tokens"] == 9


def test_a_model_without_classes_names_what_it_has(address: str) -> None:
    answer = httpx.post(f"{address}/v1/classify", json={"model": "tiny", "input": "a"}, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "model"
    assert error["message"] == (
        "tiny is no sequence classifier and has no classes: use /v1/embeddings, /v1/score or /v1/rerank"
    )


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/rerank", {"query": QUERY, "documents": []}, "documents", "documents is empty: give at least one entry"),
        ("/v1/rerank", {"query": QUERY, "documents": ["a", "x" * 99]}, "documents[1]", "max_seq_len is 64"),
        ("/v1/rerank", {"query": "x" * 99, "documents": ["a", "b"]}, "query", "query: the text has"),
        ("/v1/rerank", {"query": QUERY, "documents": "a"}, "documents", "list"),
        ("/v1/score", {"text_1": "x" * 99, "text_2": ["a", "b"]}, "text_1", "text_1: the text has"),
        ("/v1/score", {"text_1": ["a", "x" * 99], "text_2": ["a", "b"]}, "text_1[1]", "max_seq_len is 64"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "x" * 99]}, "text_2[1]", "max_seq_len is 64"),
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1", "text_1 is empty: give at least one entry"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2", "text_2 is empty: give at least one entry"),
        ("/v1/score", {"text_1": [1, 2], "text_2": "a"}, "text_1[0]", "valid string"),
        ("/v1/score", {"text_1": ["a"] * 1025, "text_2": "c"}, "text_1", "1025 texts"),
        ("/v1/rerank", {"query": QUERY}, "documents", "documents is missing"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_2", "2 first texts and 1 second ones"),
        ("/v1/score", {"text_1": "a", "text_2": ["c"] * 1025}, "text_2", "1025 texts"),
        (
            "/v1/score",
            {"text_1": "a", "text_2": "c", "truncate_prompt_tokens": 2},
            "truncate_prompt_tokens",
            "truncate_prompt_tokens = 2 has no room for the 3 special tokens",
        ),
        ("/v1/classify", {"input": ["a", "b", "x" * 99]}, "input[2]", "input[2]: the text has"),
        ("/v1/classify", {"input": "x" * 99}, "input", "max_seq_len is 64"),
        ("/v1/classify", {"input": []}, "input", "input is empty: give at least one entry"),
        ("/v1/classify", {"input": ["a", 3]}, "input[1]", "valid string"),
        ("/v1/classify", {"input": ["a"] * 1025}, "input", "1025 texts"),
        ("/v1/classify", {}, "input", "input is missing"),
        ("/v1/classify", {"input": "a", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens", "2 special tokens"),
        ("/v1/completions", {"prompt": "a"}, "prompt", "generates none: use LLM.encode"),
        ("/v1/embeddings", {"input": "a"}, "input", "is a sequence classifier and has no embeddings"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(
    reranker: str, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    answer = post(reranker, path, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_a_generating_model_scores_by_its_embeddings(address: str, tiny_llm: LLM) -> None:
    answer = httpx.post(
        f"{address}/v1/rerank", json={"model": "tiny", "query": QUERY, "documents": DOCUMENTS}, timeout=60
    ).json()
    query, *documents = (output.embedding for output in tiny_llm.embed([QUERY, *DOCUMENTS]))
    for result in answer["results"]:
        assert result["relevance_score"] == pytest.approx(float(query @ documents[result["index"]]), abs=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {"text_1": ["a", "x" * 999], "text_2": ["a", "b"]}, "text_1[1]"),
        ("/v1/score", {"text_1": "a", "text_2": ["a", "x" * 999]}, "text_2[1]"),
        ("/v1/score", {"text_1": "x" * 999, "text_2": "a"}, "text_1"),
        ("/v1/rerank", {"query": "x" * 999, "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a", "b", "x" * 999]}, "documents[2]"),
        ("/v1/embeddings", {"input": ["a", "x" * 999]}, "input[1]"),
        ("/v1/embeddings", {"input": "x" * 999}, "input"),
        ("/v1/embeddings", {"input": [[1], [1, 99999]]}, "input[1]"),
        ("/v1/completions", {"prompt": ["a", "x" * 999]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [1, 99999]}, "prompt"),
    ],
)
def test_of_several_texts_the_wrong_one_is_named(address: str, path: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{address}{path}", json={"model": "tiny", **body}, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert "max_seq_len is" in error["message"] or "holds 99999" in error["message"]


def test_of_a_pair_the_text_with_a_token_that_the_model_lacks_is_named(
    reference: PreTrainedModel, tmp_path: Path, served: Served
) -> None:
    reference.save_pretrained(tmp_path)
    larger = tokenizer()
    larger.add_tokens([*(f"<{index}>" for index in range(60)), "<new>"])
    larger.save_pretrained(tmp_path)
    assert larger.convert_tokens_to_ids("<new>") >= SIZES["vocab_size"]
    settings = ServeSettings(model_names=("reranker",))
    with (
        LLM(tmp_path, dtype="float32", max_batch_size=4, max_num_tokens=64) as llm,
        served(create_app(llm, settings)) as url,
    ):
        for body, param in (
            ({"text_1": ["a", "<new>"], "text_2": ["a", "a long text"]}, "text_1[1]"),
            ({"text_1": ["a", "a long text"], "text_2": ["<new>", "a"]}, "text_2[0]"),
        ):
            error = post(url, "/v1/score", **body).json()["error"]
            assert error["param"] == param
            assert "'<new>' of the tokenizer" in error["message"]


def test_its_health_is_that_of_a_step(reranker: str) -> None:
    assert httpx.get(f"{reranker}/health_generate", timeout=60).status_code == 200
    assert "trtllm_kv_cache_max_blocks" in httpx.get(f"{reranker}/prometheus/metrics", timeout=60).text


def test_a_chat_is_refused(reranker: str) -> None:
    with (
        OpenAI(base_url=f"{reranker}/v1", api_key="none", max_retries=0, timeout=60) as client,
        pytest.raises(BadRequestError, match=r"computes texts whole and generates none: use LLM\.encode"),
    ):
        client.chat.completions.create(model="reranker", messages=[{"role": "user", "content": "a"}])
