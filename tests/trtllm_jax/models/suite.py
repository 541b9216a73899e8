"""What every architecture has to pass: a test class subclasses `ModelSuite` and names tiny configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import PreTrainedConfig

from checkpoints.table import expand, to_stored

from .paged import Step, relative_error
from .tiny import TinyModel

LONG, SHORT = 41, 12
"""Lengths of two prompts in one batch; the first is longer than a tile of the prefill and than some trained lengths."""

NOTHING = range(0)
WHOLE: Sequence[Step] = [[range(LONG), range(SHORT)]]
CHUNKS: Sequence[Step] = [
    [range(0, 3), range(0, SHORT - 1)],
    [range(3, LONG - 1), range(SHORT - 1, SHORT)],
    [range(LONG - 1, LONG), NOTHING],
]
ONE_BY_ONE: Sequence[Step] = [
    [range(i, i + 1), range(i, i + 1) if i < SHORT else NOTHING] for i in range(LONG)
]


class ModelSuite:
    """`configs` are run layer by layer against transformers; those named in `served` through an engine too."""

    configs: ClassVar[Mapping[str, PreTrainedConfig]]
    served: ClassVar[Sequence[str]]

    @pytest.mark.parametrize("steps", [WHOLE, CHUNKS, ONE_BY_ONE], ids=["whole", "chunks", "one by one"])
    def test_logits_are_those_of_transformers(self, tiny: TinyModel, steps: Sequence[Step]) -> None:
        prompts = [tiny.prompt(LONG), tiny.prompt(SHORT)]
        for prompt, logits in zip(prompts, tiny.split().logits(prompts, steps), strict=True):
            assert relative_error(logits, tiny.expected_logits(prompt)) < 1e-4

    @pytest.mark.multi_device(4)
    @pytest.mark.parametrize("devices", [2, 4])
    def test_devices_share_the_work_without_changing_it(self, tiny: TinyModel, devices: int) -> None:
        prompts = [tiny.prompt(LONG), tiny.prompt(SHORT)]
        alone = tiny.split().logits(prompts, WHOLE)
        for shared, logits in zip(tiny.split(devices).logits(prompts, WHOLE), alone, strict=True):
            assert relative_error(shared, logits) < 1e-5

    @pytest.mark.multi_device(4)
    def test_parameters_go_back_to_the_stored_tensors_bit_for_bit(self, tiny: TinyModel) -> None:
        """From four devices, so that the padding of heads, channels and vocabulary has to go too."""
        config, split = tiny.model.config, tiny.split(4)
        stored = {}
        for weight in expand(tiny.model.module.table(config), config.num_layers):
            array = split.params
            for key in weight.path.split("."):
                array = array[int(key) if key.isdigit() else key]
            stored.update(to_stored(weight, jax.device_get(array), config.sizes, split.padded))
        expected = load_file(tiny.folder / "model.safetensors")
        assert stored.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(stored[name].view(np.uint32), values.view(np.uint32), err_msg=name)

    def test_greedy_tokens_are_those_of_transformers(self, tiny: TinyModel, engine) -> None:
        """More prompts than rows, at once; then again, when the prefix cache knows most of each."""
        prompts = [tiny.prompt(length) for length in (1, 40, 5, 17, 8)]
        expected = [tiny.expected_tokens(prompt, 16) for prompt in prompts]
        assert engine.greedy(prompts, 16) == expected
        assert engine.greedy(prompts, 16) == expected
