"""Tiny models of random weights: transformers' model, and ours loaded from the checkpoint that it saved."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from checkpoints.checkpoint import open_checkpoint
from trtllm_jax.functional.model import Model
from trtllm_jax.functional.research import open_model

from .paged import PagedModel, Prompt


class TinyModel:
    """A random model of transformers, and ours loaded from its checkpoint."""

    def __init__(self, config: PreTrainedConfig, folder: Path, module: ModuleType | None = None) -> None:
        config = copy.deepcopy(config)
        # Without such ids a sequence ends at its limit only, and generating masks none.
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        attention = config._attn_implementation or "eager"  # where eager is wrong, a configuration states another
        self._reference: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention
        ).eval()
        generator = torch.Generator().manual_seed(0)
        for name, weight in self._reference.named_parameters():
            # Far from zero, so that no two logits are close and every weight matters.
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3, generator=generator)
        self._reference.save_pretrained(folder)
        self.hf_config = config
        self.folder = folder
        if module is None:
            self.model = open_model(folder)
        else:
            checkpoint = open_checkpoint(folder)
            self.model = Model(module, module.Config.from_hf(checkpoint.config), checkpoint=checkpoint)
        self._split: dict[int, PagedModel] = {}

    def prompt(self, length: int) -> list[int]:
        """Random ids."""
        ids: list[int] = np.random.default_rng(length).integers(0, self.model.config.vocab, length).tolist()
        return ids

    def split(self, tensor_parallel_size: int = 1) -> PagedModel:
        """Our model over `devices` devices; loaded and compiled once."""
        if tensor_parallel_size not in self._split:
            self._split[tensor_parallel_size] = PagedModel(self.model, self.model.files.tensors, tensor_parallel_size)
        return self._split[tensor_parallel_size]

    @torch.no_grad()
    def expected_logits(self, prompt: Prompt) -> np.ndarray:
        """Transformers' logits [length, vocab]."""
        logits: np.ndarray = self._fresh()(torch.tensor([prompt]), use_cache=False).logits[0].numpy()
        return logits

    def expected_gradients(self, prompt: Prompt) -> tuple[float, dict[str, np.ndarray]]:
        """The log-probability of a prompt after its first token, and its gradients by the tensors of the checkpoint."""
        model, ids = self._fresh(), torch.tensor([prompt])
        scores = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        total = scores.gather(1, ids[0, 1:, None]).sum()
        total.backward()
        # Some are stored under another name, an older one; random weights tell which.
        stored = {values.tobytes(): name for name, values in load_file(self.folder / "model.safetensors").items()}
        gradients = {}
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            gradients[stored[weight.detach().numpy().tobytes()]] = weight.grad.numpy()
        return total.item(), gradients

    def expected_tokens(self, prompt: Prompt, new: int) -> list[int]:
        """Transformers' greedy continuation."""
        ids = torch.tensor([prompt])
        out = self._fresh().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def _fresh(self) -> PreTrainedModel:
        """A copy of the reference: dynamic rope remembers the longest prompt that it saw."""
        return copy.deepcopy(self._reference)
