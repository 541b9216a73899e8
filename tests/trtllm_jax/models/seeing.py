"""Models that see pictures, of which we compute the language model: random weights, and a comparison with ours."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from checkpoints.table import expand, leaf_of, to_stored
from sharding import Extents
from trtllm_jax import load_model

from .paged import relative_error

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


def random_weights(model: AnyModel) -> AnyModel:
    """The model with weights far from zero, so that every one of them matters."""
    torch.manual_seed(0)
    for name, weight in model.eval().named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    return model


@torch.no_grad()
def check_language_model(reference: PreTrainedModel, folder: Path, prefix: str, unused: Collection[str] = ()) -> None:
    """Ours of the folder has the reference's logits, and gives back the tensors of this prefix but those unused."""
    model, params = load_model(folder, dtype="float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab, (1, 41))
    expected = reference(torch.tensor(ids), use_cache=False).logits[0].numpy()
    assert relative_error(np.asarray(jax.jit(model)(params, ids))[0], expected) < 1e-4

    files = load_file(folder / "model.safetensors")
    rows = expand(model.module.table(model.config), model.config.num_layers)
    extents = Extents(model.config.sizes)
    stored = dict(pair for row in rows for pair in to_stored(row, leaf_of(params, row.path), extents))
    assert stored.keys() == {name for name in files if name.startswith(prefix)} - set(unused)
    for name, values in stored.items():
        np.testing.assert_array_equal(values, files[name], err_msg=name)
