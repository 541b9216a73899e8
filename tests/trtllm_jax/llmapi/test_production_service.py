"""The service class of TensorRT-LLM's manual, as written, over a tiny model on two devices."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trtllm_jax.tiny_engine import held
from trtllm_jax import SamplingParams
from trtllm_jax.engine import build, kv_cache
from trtllm_jax.engine.config import BackendDefaults
from trtllm_jax.llmapi import LoRARequest

MANUAL = """
from tensorrt_llm import LLM
from tensorrt_llm.llmapi import BuildConfig, KvCacheConfig, SamplingParams, QuantConfig, QuantAlgo, LoRARequest

class ProductionLLMService:
    def __init__(self, model_path, config):
        build_config = BuildConfig(
            max_batch_size=config.get('max_batch_size', 16), max_input_len=config.get('max_input_len', 2048),
            max_seq_len=config.get('max_seq_len', 4096), max_beam_width=config.get('max_beam_width', 1),
            strongly_typed=True, use_refit=True, weight_streaming=config.get('weight_streaming', False))
        kv_cache_config = KvCacheConfig(free_gpu_memory_fraction=config.get('kv_cache_fraction', 0.85),
                                        enable_block_reuse=True, max_tokens_in_paged_kv_cache=None)
        quant_config = None
        if config.get('enable_quantization', False):
            quant_config = QuantConfig(quant_algo=QuantAlgo.FP8, kv_cache_quant_algo=QuantAlgo.INT8, group_size=128)
        self.llm = LLM(model=model_path, tensor_parallel_size=config.get('tensor_parallel_size', 1),
                       pipeline_parallel_size=config.get('pipeline_parallel_size', 1), build_config=build_config,
                       kv_cache_config=kv_cache_config, quant_config=quant_config, trust_remote_code=True)

    def generate_text(self, prompts, max_tokens=100, temperature=0.8, top_p=0.9, lora_request=None):
        sampling_params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p,
                                         repetition_penalty=1.1, length_penalty=1.0)
        outputs = self.llm.generate(prompts, sampling_params=sampling_params, lora_request=lora_request)
        return [{'prompt': o.prompt, 'generated_text': o.outputs[0].text,
                 'finish_reason': o.outputs[0].finish_reason, 'token_ids': o.outputs[0].token_ids} for o in outputs]

    def generate_streaming(self, prompt, **kwargs):
        for output in self.llm.generate(prompt, sampling_params=SamplingParams(**kwargs), streaming=True):
            yield output.outputs[0].text

    def shutdown(self):
        self.llm.shutdown()
"""
CONFIG = {"max_batch_size": 1, "max_input_len": 64, "max_seq_len": 224, "tensor_parallel_size": 2}
PROMPTS = ["请解释什么是人工智能", "写一首关于春天的诗"]
AS_THE_MANUAL = {"max_tokens": 150, "temperature": 0.7}

pytestmark = pytest.mark.multi_device(2)


def service_class() -> Any:
    names: dict[str, Any] = {}
    exec(MANUAL.replace("tensorrt_llm", "trtllm_jax"), names)
    return names["ProductionLLMService"]


@pytest.fixture(scope="module")
def service(tiny_llama: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # The class leaves max_num_tokens to the engine, whose steps of up to 512 tokens take long to compile.
        patch.setattr(kv_cache, "CPU_POOL_BYTES", 64 << 20)
        patch.setattr(
            build, "backend_defaults", lambda platform: BackendDefaults(32, max_num_tokens=16, max_decode_steps=8)
        )
        service = service_class()(str(tiny_llama), CONFIG)
    yield service
    service.shutdown()
    with pytest.raises(RuntimeError, match="shut"):
        service.llm.generate("x")


def test_texts(service: Any) -> None:
    results = service.generate_text(PROMPTS, **AS_THE_MANUAL)
    assert [result["prompt"] for result in results] == PROMPTS
    for result in results:
        assert 0 < len(result["token_ids"]) <= 150
        assert result["finish_reason"] in ("stop", "length")
        text = service.llm.tokenizer.decode(result["token_ids"])
        assert result["generated_text"] == text


def test_what_the_texts_are_made_of(service: Any) -> None:
    params = SamplingParams(**AS_THE_MANUAL, top_p=0.9, length_penalty=1.0)
    for prompt, output in zip(PROMPTS, service.llm.generate(PROMPTS, sampling_params=params), strict=True):
        assert output.prompt == prompt
        assert bytes_of(service, output.prompt_token_ids) == prompt.encode()
        assert 0 < output.outputs[0].length <= 150


def test_penalties_and_reported_logits_on_two_devices(
    service: Any, generate_by_transformers: Any, logits_by_transformers: Any
) -> None:
    prompt = list(PROMPTS[0].encode())
    params = SamplingParams(
        max_tokens=30,
        ignore_eos=True,
        repetition_penalty=1.3,
        return_context_logits=True,
        return_generation_logits=True,
    )
    output = service.llm.generate(prompt, params)
    answer = output.outputs[0]
    assert answer.token_ids == generate_by_transformers(prompt, 30, repetition_penalty=1.3)
    told = np.concatenate([output.context_logits, answer.generation_logits[1:]])
    np.testing.assert_allclose(told, logits_by_transformers([*prompt, *answer.token_ids])[:-1], atol=1e-4)


def bytes_of(service: Any, ids: list[int]) -> bytes:
    """What the tiny model's tokens, each of them a byte, spell."""
    return service.llm.tokenizer.decode(ids).encode()


def test_a_stream(service: Any, greedy_by_transformers: Any) -> None:
    texts = []
    with held(service.llm, after=4) as go_on:  # three steps of the prompt, and one more
        for text in service.generate_streaming(PROMPTS[0], max_tokens=40, ignore_eos=True):
            texts.append(text)
            go_on.set()
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    ids = service.llm.tokenizer.encode(PROMPTS[0])
    assert texts[-1] == service.llm.tokenizer.decode(greedy_by_transformers(ids, 40))
    assert len(texts) > 1


def test_quantisation_is_refused_by_name(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"LLM.quant_config.quant_algo = 'FP8' is not available in this release"):
        service_class()(str(tiny_llama), CONFIG | {"enable_quantization": True})


def test_adapters_are_refused(service: Any, tmp_path: Path) -> None:
    request = LoRARequest(lora_name="math_lora", lora_path=str(tmp_path))
    with pytest.raises(ValueError, match="lora_request is not available in this release"):
        service.llm.generate(PROMPTS, lora_request=request)
