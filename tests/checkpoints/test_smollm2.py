"""The real SmolLM2-135M-Instruct in GGUF, against transformers' own reading of the same file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.gguf_names import hugging_face_name

from .gguf_llama import LLAMA

TEXTS = (
    "Hello, my name is",
    "The year 2024 had 366 days, 12345678 of something: 3.14159 and 1e-10.",
    "你好，世界！今天天气怎么样？我们用中文聊天。",  # noqa: RUF001
    "Grüße, naïve café — “quotes” … Ω≈ç√ Привет мир こんにちは 안녕하세요 שלום مرحبا",
    "👍🏽 🙂 👨‍👩‍👧‍👦 flags 🇨🇭",
    "def f(x):\n\treturn {k: v for k, v in x.items()}  # it's\n\n\n    pass\n",
    "#include <vector>\nint main() { std::vector<int> v{1,2,3}; return v[0]<<2; }",
    "   leading, trailing and  double   spaces   ",
    "\n\n\t \r\n mixed \u00a0 whitespace \u2003 runs\n\n\n\n        end",
    "I'll, we've, they're, don't, IT'S, CAN'T, y'all'd",
    "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n<|endoftext|><file_sep> <|not_a_token|>",
    "٣٤٥ ½ Ⅷ ² a1b2c3 1,000,000",
    "",
)


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf: Path) -> Checkpoint:
    return open_checkpoint(smollm2_gguf, gguf_architectures=[LLAMA])


def test_the_configuration_is_the_published_one(checkpoint: Checkpoint) -> None:
    # From the model's card and config.json: HuggingFaceTB/SmolLM2-135M-Instruct.
    published = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert published.items() <= checkpoint.config.items()
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}


@pytest.mark.slow
def test_the_tokenizer_is_transformers_own(checkpoint: Checkpoint, smollm2_gguf: Path) -> None:
    ours = checkpoint.load_tokenizer()
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # The published tokenizer.json splits off every digit, which transformers forgets for GGUF.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert len(ours) == len(theirs) == 49152
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi"}]
    ours_chat, theirs_chat = (
        t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)
    )
    assert ours_chat == theirs_chat
    assert ours_chat.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_tensors_are_transformers_own(checkpoint: Checkpoint, smollm2_gguf: Path) -> None:
    reader = gguf.GGUFReader(smollm2_gguf)
    assert len(checkpoint.tensors.info) == len(reader.tensors) == 272
    processor = LlamaTensorProcessor(config=checkpoint.config)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and not tensor.name.startswith(("blk.0.", "blk.29.")):
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = processor.process(values, tensor.name).weights
        found = checkpoint.tensors.read(hugging_face_name(tensor.name, LLAMA), (slice(None),) * expected.ndim)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_the_weights_speak(checkpoint: Checkpoint) -> None:
    """Run by torch, the tensors under their names continue a sentence as the model does: the whole file fits."""
    state = {
        name: torch.from_numpy(checkpoint.tensors.read(name, (slice(None),) * len(info.shape)).copy())
        for name, info in checkpoint.tensors.info.items()
    }
    config = LlamaConfig.from_dict(checkpoint.config)
    model, report = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = checkpoint.load_tokenizer()
    ids = tokenizer.encode("The capital of France is")
    with torch.no_grad():
        likeliest = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert tokenizer.decode(likeliest) == " Paris"
