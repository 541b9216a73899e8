"""More devices than key-value heads: each head is held several times, and everything is as on one device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from safetensors.numpy import load_file
from transformers import LlamaConfig

from trtllm_jax import LLM, SamplingParams, load_model
from trtllm_jax.llmapi import KvCacheConfig

from .paged import relative_error
from .suite import ONE_BY_ONE, WHOLE, stored_tensors
from .tiny import TinyModel

CONFIG = LlamaConfig(
    vocab_size=101, hidden_size=48, intermediate_size=90, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, attention_bias=True,
)  # fmt: skip
SAMPLING = SamplingParams(max_tokens=12, end_id=-1)

devices = pytest.mark.parametrize("devices", [pytest.param(n, marks=pytest.mark.multi_device(n)) for n in (4, 8)])


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Two key-value heads of four query heads each."""
    return TinyModel(CONFIG, tmp_path_factory.mktemp("two_heads"))


@devices
def test_the_model_has_as_many_query_heads_as_before(two_heads: TinyModel, devices: int) -> None:
    layer = two_heads.split(devices).params["layers"][0]
    assert layer["qkv"].shape == (devices, 8 // devices + 2, 8, 48)
    assert layer["qkv_bias"].shape == (devices, 8 // devices + 2, 8)
    assert layer["o"].shape == (48, devices, 8 // devices, 8)


@devices
@pytest.mark.parametrize("steps", [WHOLE, ONE_BY_ONE], ids=["whole", "one by one"])
def test_logits_are_those_of_one_device(two_heads: TinyModel, devices: int, steps: list) -> None:
    prompts = [two_heads.prompt(41), two_heads.prompt(12)]
    found = two_heads.split(devices).logits(prompts, steps)
    for ours, expected in zip(found, two_heads.split(1).logits(prompts, steps), strict=True):
        assert relative_error(ours, expected) < 1e-5


@devices
def test_parameters_go_back_to_the_stored_tensors_bit_for_bit(two_heads: TinyModel, devices: int) -> None:
    split = two_heads.split(devices)
    stored = stored_tensors(two_heads, split.params, split.extents)
    expected = load_file(two_heads.folder / "model.safetensors")
    assert {name: values.tobytes() for name, values in stored.items()} == {
        name: values.tobytes() for name, values in expected.items()
    }


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.multi_device(n)) for n in (4, 8)])
def llm(request: pytest.FixtureRequest, two_heads: TinyModel) -> Iterator[LLM]:
    with LLM(
        two_heads.folder, tensor_parallel_size=request.param, dtype="float32", skip_tokenizer_init=True,
        enforce_eager=True, max_batch_size=2, max_num_tokens=16, max_seq_len=64,
        kv_cache_config=KvCacheConfig(max_tokens=256, tokens_per_block=8),
    ) as llm:  # fmt: skip
        yield llm


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(llm: LLM, two_heads: TinyModel) -> None:
    for length in (3, 20):
        prompt = two_heads.prompt(length)
        assert llm.generate(prompt, SAMPLING).outputs[0].token_ids == two_heads.expected_tokens(prompt, 12)


@pytest.mark.slow
def test_every_device_caches_one_head(llm: LLM) -> None:
    for cache in llm._engine._runner._registers["caches"]:
        assert {shard.data.shape[2] for shard in cache.addressable_shards} == {1}


@pytest.mark.slow
def test_weights_of_load_model_fit(llm: LLM, two_heads: TinyModel) -> None:
    mesh = llm.params["embed"].sharding.mesh
    prompt = two_heads.prompt(5)
    before = llm.generate(prompt, SAMPLING).outputs[0].token_ids
    llm.update_weights(load_model(two_heads.folder, dtype="float32", mesh=mesh, load_format="dummy")[1])
    assert llm.generate(prompt, SAMPLING).outputs[0].token_ids != before
    llm.update_weights(load_model(two_heads.folder, dtype="float32", mesh=mesh)[1])
    assert llm.generate(prompt, SAMPLING).outputs[0].token_ids == before
