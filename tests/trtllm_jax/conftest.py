"""A tiny random Llama with a byte-level tokenizer, as a Hugging Face folder, and its results by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EOS = 256


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by transformers; every byte is a token, so that text can be cut inside a character."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=257, eos_token_id=EOS, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_torch(tiny_llama: Path) -> Any:
    """The tiny Llama as transformers' model, in float32 on the CPU."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="session")
def generate_by_transformers(tiny_torch: Any) -> Callable[..., list[int]]:
    """Greedy ids of the tiny Llama by transformers: (prompt, count, further arguments of its generate) -> ids."""
    import torch

    def generate(prompt: list[int], count: int, **more: Any) -> list[int]:
        ids = torch.tensor([prompt])
        # Without a mask, generate would treat ids of the prompt that equal the pad id as padding.
        more = {"eos_token_id": None, "pad_token_id": 0, **more}
        out = tiny_torch.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **more
        )
        return out[0, len(prompt) :].tolist()

    return generate


@pytest.fixture(scope="session")
def greedy_by_transformers(generate_by_transformers: Callable[..., list[int]]) -> Callable[[list[int], int], list[int]]:
    """Greedy ids of the tiny Llama by transformers: (prompt, count) -> ids."""
    return generate_by_transformers


@pytest.fixture(scope="session")
def logits_by_transformers(tiny_torch: Any) -> Callable[[list[int]], np.ndarray]:
    """The tiny Llama's logits by transformers: (ids) -> [ids, vocab], after each id."""
    import torch

    def logits(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return tiny_torch(torch.tensor([tokens])).logits[0].numpy()

    return logits
