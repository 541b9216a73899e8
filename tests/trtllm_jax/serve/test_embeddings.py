"""/v1/embeddings by OpenAI's client, against what transformers computes."""

import base64
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

from trtllm_jax import LLM

TEXTS = ["hello", "a longer text than the first one, of more than one chunk"]


@pytest.fixture(scope="module")
def expected(tiny_torch: Any, tiny_llm: LLM) -> list[np.ndarray]:
    import torch

    found = []
    for text in TEXTS:
        ids = tiny_llm.tokenizer.encode(text, add_special_tokens=True)
        with torch.no_grad():
            last = tiny_torch.model(torch.tensor([ids])).last_hidden_state[0, -1]
        found.append((last / last.norm()).numpy())
    return found


@pytest.mark.parametrize("form", [None, "float", "base64"])
def test_texts(client: OpenAI, expected: list[np.ndarray], form: Any) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXTS, **({"encoding_format": form} if form else {}))
    for index, (one, wanted) in enumerate(zip(answer.data, expected, strict=True)):
        assert one.index == index
        found = np.frombuffer(base64.b64decode(one.embedding), "<f4") if form == "base64" else one.embedding
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, TEXTS))


def test_ids_are_the_same_prompt(client: OpenAI, tiny_llm: LLM, expected: list[np.ndarray]) -> None:
    ids = [tiny_llm.tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    for given, wanted in ((ids, expected), (ids[0], expected[:1]), (TEXTS[0], expected[:1])):
        answer = client.embeddings.create(model="tiny", input=given)
        np.testing.assert_allclose([one.embedding for one in answer.data], wanted, atol=2e-5)


def test_fewer_dimensions_have_length_one_again(client: OpenAI, expected: list[np.ndarray]) -> None:
    (one,) = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=16).data
    start = expected[0][:16]
    np.testing.assert_allclose(one.embedding, start / np.linalg.norm(start), atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [999]}, "input"),
        ({"input": "x" * 200}, "input"),
        ({"input": ["x"] * 1025}, "input"),
        ({"dimensions": 65}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/embeddings", json={"model": "tiny", "input": "x", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="x")
