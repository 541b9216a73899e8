"""The real SmolLM2-135M from its quantised GGUF file, against transformers' reading of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trtllm_jax import LLM, SamplingParams
from trtllm_jax.functional.research import open_model

from .paged import PagedModel, relative_error

pytestmark = pytest.mark.slow

TEXT = (
    "The history of computing is older than the machines that we call computers. Long before there were circuits, "
    "people built devices to add and to multiply, and they wrote down rules"
)
OTHER = "Once upon a time"


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    return model.eval()


@torch.no_grad()
def expected_logits(reference: PreTrainedModel, ids: list[int]) -> np.ndarray:
    logits: np.ndarray = reference(torch.tensor([ids])).logits[0].numpy()
    return logits


@pytest.fixture(scope="module")
def answers(smollm2_gguf: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids of two prompts that were answered together, and 64 greedy tokens of each."""
    with LLM(smollm2_gguf, dtype="float32", max_batch_size=2, max_num_tokens=16, max_seq_len=256) as llm:
        outputs = llm.generate([TEXT, OTHER], SamplingParams(max_tokens=64, ignore_eos=True))
    return [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]


def test_greedy_tokens(reference: PreTrainedModel, answers: list[tuple[list[int], list[int]]]) -> None:
    """Each token is the likeliest one after all before it, which is what greedy decoding means."""
    for prompt, tokens in answers:
        likeliest = expected_logits(reference, prompt + tokens).argmax(-1)
        assert len(tokens) == 64
        assert likeliest[len(prompt) - 1 : -1].tolist() == tokens


@pytest.mark.multi_device(4)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_logits_and_first_tokens_on_several_devices(
    smollm2_gguf: Path, reference: PreTrainedModel, answers: list[tuple[list[int], list[int]]], devices: int
) -> None:
    """The 9 query and 3 key heads are padded to 12 and 4 where two or four devices share them."""
    model = open_model(smollm2_gguf)
    split = PagedModel(model, model.files.tensors, devices)
    assert split.extents["kv_heads"] == (3 if devices == 1 else 4)

    prompt, tokens = answers[0]
    ids = prompt + tokens[:16]
    (logits,) = split.logits([ids], [[range(len(ids))]])
    assert relative_error(logits, expected_logits(reference, ids)) < 1e-4
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[:16]
