"""The engine on a GPU: the same tokens as transformers in float32, and a cache that takes its share of the memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trtllm_jax import LLM, SamplingParams
from trtllm_jax.common.errors import RequestError

pytestmark = pytest.mark.gpu

SIZES = {"max_batch_size": 4, "max_num_tokens": 64, "max_seq_len": 256}
PROMPTS = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (1, 7, 33, 100)]


@pytest.fixture
def exact_matmuls() -> Iterator[None]:
    """Without this a GPU multiplies float32 in tf32, whose rounding changes tokens."""
    with jax.default_matmul_precision("highest"):
        jax.config.update("jax_default_matmul_precision", "highest")  # the engine compiles in other threads
        yield
    jax.config.update("jax_default_matmul_precision", None)


def test_greedy_tokens_are_those_of_transformers(
    tiny_llama: Path, exact_matmuls: None, greedy_by_transformers: Callable[[list[int], int], list[int]]
) -> None:
    with LLM(tiny_llama, dtype="float32", kv_cache_config={"max_tokens": 2048}, **SIZES) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=40, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_by_transformers(prompt, 40)


def test_penalties_and_bans_are_those_of_transformers(
    tiny_llama: Path, exact_matmuls: None, generate_by_transformers: Callable[..., list[int]]
) -> None:
    wishes = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    with LLM(tiny_llama, dtype="float32", kv_cache_config={"max_tokens": 2048}, **SIZES) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=40, ignore_eos=True, **wishes))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.outputs[0].token_ids == generate_by_transformers(prompt, 40, **wishes)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (6, 2, 80), (8, 1, 128)])
def test_heads_of_usual_sizes_give_the_tokens_of_transformers(
    tmp_path: Path, exact_matmuls: None, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Prompts of one token, of a chunk, and of several chunks beside decoding rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=192, intermediate_size=256, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    with LLM(tmp_path, dtype="float32", skip_tokenizer_init=True, kv_cache_config={"max_tokens": 2048}, **SIZES) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=40, end_id=-1, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()


def test_bfloat16_repeats_itself_and_fills_the_memory_asked_for(tiny_llama: Path) -> None:
    stats = jax.devices()[0].memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    with LLM(tiny_llama, dtype="bfloat16", kv_cache_config={"free_gpu_memory_fraction": 0.5}, **SIZES) as llm:
        params = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True)
        first, second = llm.generate([PROMPTS[2]] * 2, params)
        # Two layers, keys and values, two heads of 16 channels, two bytes each.
        cache_bytes = llm.get_kv_cache_capacity()["maxNumTokens"] * 2 * 2 * 2 * 16 * 2
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert 0.4 * free < cache_bytes < 0.5 * free


def test_weights_that_are_no_numbers_leave_nothing_behind(tmp_path: Path) -> None:
    """Steps of prompts that Hopper's own kernel takes, chunks and decoding rows, over pages that all held NaN."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=258, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=2048,
    ).save_pretrained(tmp_path)  # fmt: skip
    prompts = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (1500, 1060, 33, 1)]
    params = SamplingParams(max_tokens=20, end_id=-1, ignore_eos=True, logprobs=0)
    sizes = {"max_batch_size": 4, "max_num_tokens": 2048, "max_seq_len": 2048, "kv_cache_config": {"max_tokens": 8192}}
    with LLM(tmp_path, load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, **sizes) as llm:
        weights = jax.tree.map(jnp.copy, llm.params)
        before = [llm.generate(prompt, params).outputs[0] for prompt in prompts]
        llm.update_weights(jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), weights))
        llm.generate([[i, *prompts[0]] for i in range(16)], SamplingParams(max_tokens=400, end_id=-1, ignore_eos=True))
        with pytest.raises(RequestError, match="the model's logits hold NaN"):
            llm.generate(prompts[2], params)
        llm.update_weights(weights)
        for prompt, old in zip(prompts, before, strict=True):
            new = llm.generate(prompt, params).outputs[0]
            assert new.token_ids == old.token_ids
            assert new.cumulative_logprob == old.cumulative_logprob
