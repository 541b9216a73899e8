"""The tests of every architecture: a test class subclasses `ModelSuite` and names tiny configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import PreTrainedConfig

from checkpoints.table import Params, expand, leaf_of, to_stored
from sharding import Extents
from trtllm_jax import load_model

from .paged import Prompt, Step, relative_error
from .tiny import TinyModel

LONG, SHORT = 41, 12
"""Lengths of two prompts in one batch; the first is longer than a tile of the prefill and than some trained lengths."""

NOTHING = range(0)
WHOLE: Sequence[Step] = [[range(LONG), range(SHORT)]]
CHUNKS: Sequence[Step] = [
    [range(3), range(SHORT - 1)],
    [range(3, LONG - 1), range(SHORT - 1, SHORT)],
    [range(LONG - 1, LONG), NOTHING],
]
ONE_BY_ONE: Sequence[Step] = [[range(i, i + 1), range(i, i + 1) if i < SHORT else NOTHING] for i in range(LONG)]


def stored_tensors(tiny: TinyModel, params: Params, extents: Extents) -> dict[str, np.ndarray]:
    """The checkpoint's tensors that a tree like the weights' was made of, by name."""
    config = tiny.model.config
    stored: dict[str, np.ndarray] = {}
    for weight in expand(tiny.model.module.table(config), config.num_layers):
        array = leaf_of(params, weight.path)
        stored.update(to_stored(weight, jax.device_get(array), extents))
    return stored


class ModelSuite:
    """Tests of `configs` against transformers in float32; those that `served` names run through an engine too.

    The more heads, channels and vocabulary entries that four devices do not divide, the better.
    """

    configs: ClassVar[Mapping[str, PreTrainedConfig]]
    served: ClassVar[Sequence[str]]
    slow: ClassVar[Sequence[str]] = ()
    """The configurations whose tests are all slow."""

    @pytest.mark.parametrize("steps", [WHOLE, CHUNKS, ONE_BY_ONE], ids=["whole", "chunks", "one by one"])
    def test_logits_are_those_of_transformers(self, tiny: TinyModel, steps: Sequence[Step]) -> None:
        prompts = [tiny.prompt(LONG), tiny.prompt(SHORT)]
        for prompt, logits in zip(prompts, tiny.split().logits(prompts, steps), strict=True):
            assert relative_error(logits, tiny.expected_logits(prompt)) < 1e-4

    def test_logits_without_a_cache_are_those_of_transformers_and_of_pages(self, tiny: TinyModel) -> None:
        """The shorter prompt is padded with ids that it must not attend to."""
        prompts = [tiny.prompt(LONG), tiny.prompt(SHORT)]
        tokens = np.array([prompts[0], prompts[1] + tiny.prompt(LONG - SHORT)])
        lengths = np.array([LONG, SHORT])
        logits = np.asarray(jax.jit(tiny.model)(tiny.split().params, tokens, lengths))
        paged = tiny.split().logits(prompts, WHOLE)
        for row, prompt in enumerate(prompts):
            found = logits[row, : len(prompt)]
            assert relative_error(found, tiny.expected_logits(prompt)) < 1e-4
            assert relative_error(found, paged[row]) < 1e-5

    @pytest.mark.slow
    def test_gradients_are_those_of_torch(self, tiny: TinyModel) -> None:
        """Of a sequence's log-probability, by every weight; layers and logits are computed again on the way back."""
        prompt, config = tiny.prompt(LONG), tiny.model.config

        def score(params: Params) -> jax.Array:
            return tiny.model.logprobs(params, jnp.asarray(prompt), remat=True).sum()

        value, gradients = jax.jit(jax.value_and_grad(score))(tiny.split().params)
        expected_value, expected = tiny.expected_gradients(prompt)
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)
        found = stored_tensors(tiny, gradients, Extents(config.sizes))
        assert found.keys() >= expected.keys()  # a checkpoint may have buffers too
        largest = max(np.abs(values).max() for values in expected.values())
        for name, values in expected.items():
            # A key's bias without a rope shifts all scores alike: its gradient is zero, but for what is rounded.
            zero = max(np.abs(values).max(), np.abs(found[name]).max()) < 1e-6 * largest
            assert zero or relative_error(found[name], values) < 1e-4, name

    @pytest.mark.multi_device(4)
    @pytest.mark.slow
    def test_four_devices_compute_what_one_does(self, tiny: TinyModel) -> None:
        prompts = [tiny.prompt(LONG), tiny.prompt(SHORT)]
        alone, shared = (tiny.split(devices).logits(prompts, WHOLE) for devices in (1, 4))
        for ours, expected in zip(shared, alone, strict=True):
            assert relative_error(ours, expected) < 1e-5

    @pytest.mark.multi_device(4)
    def test_parameters_go_back_to_the_stored_tensors_bit_for_bit(self, tiny: TinyModel) -> None:
        """From four devices, so that the padding of heads, channels and vocabulary has to go too."""
        split = tiny.split(4)
        stored = stored_tensors(tiny, split.params, split.extents)
        expected = load_file(tiny.folder / "model.safetensors")
        assert stored.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(stored[name].view(np.uint32), values.view(np.uint32), err_msg=name)

    @pytest.mark.slow
    def test_greedy_tokens_are_those_of_transformers(
        self, tiny: TinyModel, generate: Callable[[Sequence[Prompt], int], list[list[int]]]
    ) -> None:
        """More prompts than rows, at once; then again, when the prefix cache knows most of each."""
        prompts = [tiny.prompt(length) for length in (1, 40, 5, 17, 8)]
        expected = [tiny.expected_tokens(prompt, 16) for prompt in prompts]
        assert generate(prompts, 16) == expected
        assert generate(prompts, 16) == expected


class GgufModelSuite(ModelSuite):
    """The same for architectures that are read from GGUF files, of which `gguf` has some configurations.

    Each with the architecture's name there.
    """

    gguf: ClassVar[Mapping[str, str]]

    def test_gguf_files_compute_what_transformers_does(self, tiny: TinyModel, gguf_file: Path) -> None:
        """As llama.cpp would convert the same checkpoint."""
        model, params = load_model(gguf_file, dtype="float32")
        logits = np.asarray(jax.jit(model)(params, np.array([tiny.prompt(LONG)])))[0]
        assert relative_error(logits, tiny.expected_logits(tiny.prompt(LONG))) < 1e-4
