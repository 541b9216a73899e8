"""A model as a `flax.nnx.Module`, for training with optax the weights that an engine serves."""

from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from trtllm_jax.functional.model import Model


class CausalLM(nnx.Module):
    """A model whose weights are `nnx.Param`s; it shares the arrays of `params` until an optimiser step replaces them.

    `CausalLM(*load_model(...))` trains with `nnx.Optimizer` like any module. `nnx.jit` or `jax.jit` with donation would
    delete arrays that an engine still uses: donate copies only.
    """

    def __init__(self, model: Model, params: Any) -> None:
        self.model = model
        self.weights = nnx.data(jax.tree.map(nnx.Param, params))

    @property
    def params(self) -> Any:
        """The weights in `load_model`'s tree, for the model's functions and `LLM.update_weights`."""
        return jax.tree.map(lambda weight: weight.get_value(), self.weights, is_leaf=lambda x: isinstance(x, nnx.Param))

    def __call__(self, tokens: ArrayLike, lengths: ArrayLike | None = None, *, remat: bool = False) -> jax.Array:
        """The logits of every position, float32 [..., s, vocab], as `Model` computes them."""
        return self.model(self.params, tokens, lengths, remat=remat)

    def logprobs(self, tokens: ArrayLike, lengths: ArrayLike | None = None, *, remat: bool = False) -> jax.Array:
        """The log-probability of every token, float32 [..., s], as `Model.logprobs` computes it."""
        return self.model.logprobs(self.params, tokens, lengths, remat=remat)
