"""What those who run a server see: metrics, statistics, logs, the document, and that one request holds up no other."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from trtllm_jax import LLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.metrics import Metrics
from trtllm_jax.serve.settings import ServeSettings

LABELS = {"model_name": "tiny", "engine_type": "trtllm_jax"}


def samples(text: str) -> dict[tuple[str, str], float]:
    """Prometheus' text by (name, the label that is not everywhere)."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = {name: value for name, value in sample.labels.items() if name not in LABELS}
            assert {name: sample.labels[name] for name in LABELS} == LABELS
            found[sample.name, ",".join(own.values())] = sample.value
    return found


def test_metrics_count_what_happened(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    with served(create_app(tiny_llm, ServeSettings(model_names=("tiny",)))) as url:
        with OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            ask: dict[str, Any] = {"model": "tiny", "prompt": ["hello", "you"], "max_tokens": 6}
            ask["extra_body"] = {"ignore_eos": True}
            client.completions.create(**ask)
            list(client.completions.create(**ask, stream=True))
            with pytest.raises(Exception, match="temperature"):
                client.completions.create(**ask, temperature=-1)
        answer = httpx.get(f"{url}/prometheus/metrics")
        records = httpx.get(f"{url}/metrics").json()
        assert httpx.get(f"{url}/metrics").json() == []
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    assert found["trtllm_request_success_total", "length"] == 4
    assert found["trtllm_request_error_total", "400"] == 1
    assert found["trtllm_prompt_tokens_total", ""] == 16
    assert found["trtllm_generation_tokens_total", ""] == 24
    assert found["trtllm_e2e_request_latency_seconds_count", ""] == 2
    assert found["trtllm_e2e_request_latency_seconds_bucket", "7680.0"] == 2
    for name in (
        "time_to_first_token", "time_per_output_token", "request_queue_time", "request_prefill_time",
        "request_decode_time", "request_inference_time",
    ):  # fmt: skip
        assert found[f"trtllm_{name}_seconds_count", ""] == 4  # prompts
    assert found["trtllm_prompt_cached_tokens_total", ""] == 0
    assert found["trtllm_kv_cache_max_blocks", ""] == tiny_llm.get_kv_cache_capacity()["maxNumBlocks"]
    assert 0 <= found["trtllm_kv_cache_utilization", ""] <= 1
    assert found["trtllm_num_requests_waiting", ""] == 0
    assert records[-1]["kvCacheStats"]["tokensPerBlock"] == 8
    assert [record["iter"] for record in records] == sorted(record["iter"] for record in records)


def test_processes_add_up_their_metrics(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom trtllm_jax.serve.metrics import Metrics\nimport trtllm_jax.serve.app\n"
        "from trtllm_jax.requests.outputs import RequestOutput\n"
        "assert 'jax' not in sys.modules\n"
        "metrics = Metrics('tiny')\noutput = RequestOutput(1, None, [1] * 7, 1, lambda: None)\n"
        "metrics.record_success(1.0, [output])\n"
        "metrics.update([{'numQueuedRequests': int(sys.argv[1])}])\nprint(metrics.exposition().decode())"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for number in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(number)], env=environment, capture_output=True, text=True, check=True
        )
    found = samples(done.stdout)
    assert found["trtllm_prompt_tokens_total", ""] == 14
    assert found["trtllm_request_success_total", "cancelled"] == 2
    assert found["trtllm_e2e_request_latency_seconds_bucket", "1.0"] == 2
    assert found["trtllm_num_requests_waiting", ""] == 2


def test_gauges_show_the_last_step_and_the_rest_is_kept() -> None:
    metrics = Metrics("tiny")
    metrics.update([])
    stats = [
        {"iter": i, "iterLatencyMS": 20.0 * i, "kvCacheStats": {"maxNumBlocks": 8, "usedNumBlocks": i}} for i in (1, 2)
    ]
    metrics.update(stats)
    found = samples(metrics.exposition().decode())
    assert found["trtllm_iteration_latency_seconds", ""] == pytest.approx(0.04)
    assert found["trtllm_kv_cache_utilization", ""] == 0.25
    assert list(metrics.stats) == stats


def test_cache_events_and_health(http: httpx.Client, client: OpenAI) -> None:
    client.completions.create(model="tiny", prompt="a prefix that is long enough for a block", max_tokens=1)
    kinds = {event["data"]["type"] for event in http.post("/kv_cache_events").json()}
    assert "stored" in kinds
    assert http.get("/health").status_code == 200
    assert http.get("/health_generate").status_code == 200
    assert http.get("/version").json()["version"]


def test_tokens_and_their_text(http: httpx.Client, tiny_llm: LLM) -> None:
    ids = tiny_llm.tokenizer.hf.encode("héllo", add_special_tokens=True)
    got = http.post("/tokenize", json={"model": "tiny", "prompt": "héllo"}).json()
    assert got == {"count": 6, "max_model_len": 160, "tokens": ids}
    assert http.post("/detokenize", json={"model": "tiny", "tokens": ids}).json() == {"prompt": "héllo"}
    long = http.post("/tokenize", json={"model": "tiny", "prompt": "x" * 10_000}).json()
    assert long["count"] == len(long["tokens"]) == 10_000
    for path, body, param in (
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": []}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/tokenize", {"prompt": "x", "model": "gpt"}, "model"),
    ):
        answer = http.post(path, json={"model": "tiny", **body})
        assert answer.status_code == (404 if param == "model" else 400)
        assert answer.json()["error"]["param"] == param


def test_logs_name_requests_and_hold_no_text(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trtllm_jax"):
        body = {"model": "tiny", "prompt": "secret words", "max_tokens": 3, "ignore_eos": True}
        assert (
            http.post("/v1/completions", json=body, headers={"x-request-id": "abc-1"}).headers["x-request-id"]
            == "abc-1"
        )
        odd = http.post("/v1/completions?key=secret", json={**body, "secret": 1}, headers={"x-request-id": "a b"})
        http.get("/se%20cret%0A")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request=")]
    first = dict(fact.split("=", 1) for fact in lines[0].split(" "))
    assert (first["request"], first["status"], first["path"]) == ("abc-1", "200", "/v1/completions")
    assert (first["prompt_tokens"], first["generated_tokens"], first["finished"]) == ("12", "3", "length")
    assert odd.headers["x-request-id"] != "a b"
    assert f"request={odd.headers['x-request-id']}" in lines[1]
    assert "secret" not in "".join(lines[:2])
    assert "\n" not in "".join(lines)


def test_the_document_says_what_there_is(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for reference in set(text.split('"$ref": "')[1:]):
        name = reference.partition('"')[0].removeprefix("#/components/schemas/")
        assert name in schemas
    assert "422" not in text
    completion = document["paths"]["/v1/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= set(completion["responses"])
    assert set(completion["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert schemas["CompletionRequest"]["additionalProperties"] is False
    assert schemas["CompletionRequest"]["required"] == ["model", "prompt"]
    for name in ("CompletionRequest", "ChatRequest"):
        assert schemas[name]["properties"]["model"]["enum"] == ["tiny", "tiny/alias"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all(operation["summary"] and operation["description"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert set(document["paths"]) == {
        "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/responses/{response_id}",
        "/v1/models", "/v1/models/{model}", "/health", "/health_generate", "/version", "/metrics", "/tokenize",
        "/detokenize", "/prometheus/metrics", "/kv_cache_events", "/v1/score", "/v1/rerank",
        "/v1/classify",
    }  # fmt: skip


def test_a_long_prompt_holds_up_nobody(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        failure, facts, tokenizer, chat_template = None, tiny_llm.facts, tiny_llm.tokenizer, None

        def generate_async(self, prompt: Any, params: Any, *, streaming: bool) -> Any:
            entered.set()
            assert leave.wait(60)
            return tiny_llm.generate_async("x", params, streaming=streaming)

    app = create_app(Slow(), ServeSettings(model_names=("tiny",)))  # type: ignore[arg-type]
    with served(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        body = {"model": "tiny", "prompt": "x" * 20_000, "max_tokens": 2}
        answers: list[int] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body).status_code)
        )
        asking.start()
        try:
            assert entered.wait(60)
            assert http.get("/health").status_code == 200
            assert not answers
        finally:
            leave.set()
            asking.join()
        assert answers == [200]


def test_a_slow_reader_gets_everything(tiny_llm: LLM, served: Callable[..., Any]) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 120, "ignore_eos": True, "temperature": 0, "stream": True}
    with served(create_app(tiny_llm, ServeSettings(model_names=("tiny",)))) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            time.sleep(0.5)
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        whole = httpx.post(f"{url}/v1/completions", json={**body, "stream": False}).json()
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
