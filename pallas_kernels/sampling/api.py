"""The public functions that choose tokens, and the choice between their implementations.

Axes in the signatures: r rows, v vocabulary.
"""

from typing import Literal

import jax

from pallas_kernels.devices import Platform
from pallas_kernels.sampling import pallas_triton, xla


def greedy(logits: jax.Array) -> jax.Array:
    """The likeliest token of each row of `logits` [r, v], the lowest id where several are: int32 [r]."""
    return xla.greedy(logits)


def sample(
    logits: jax.Array,
    *,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seed: jax.Array,
    position: jax.Array,
    implementation: Literal["xla", "triton"] | None = None,
    platform: Platform | None = None,
) -> jax.Array:
    """A token for each row, int32 [r]: temperature, then top-k, top-p and min-p, then a draw from what is left.

    The draw depends on the row's logits and parameters only, whatever else is in the batch. It is a Gumbel-max (Gumbel
    1954): the argmax of scores plus independent noise has the softmax's distribution, and the noise of a token depends
    on its id, the seed and the position alone. Ties at a threshold are all kept. A logit of minus infinity is never
    drawn; a row that has no other yields token 0.

    Args:
        logits: float32 or bfloat16 [r, v].
        temperature: float32 [r]; 0 takes the likeliest token, the lowest id where several are.
        top_k: int32 [r], how many of the likeliest tokens to keep; 0 keeps all.
        top_p: float32 [r]; keeps the smallest set of likeliest tokens whose share of what top-k left reaches it
            (Holtzman et al. 2020), up to the rounding of float32 sums. 1 keeps all.
        min_p: float32 [r]; keeps tokens at least so many times as likely as the likeliest (Nguyen et al. 2024,
            arXiv:2407.01082). 0 keeps all.
        seed: uint32 [r, 2].
        position: int32 [r], the drawn token's place in its sequence.
        implementation: None takes the kernel on a GPU and XLA elsewhere. The kernel is interpreted without a GPU.
        platform: what computes; None for JAX's default backend.
    """
    on_gpu = (platform or Platform.default()).on_gpu
    with jax.named_scope("sample"):
        if implementation == "triton" or (implementation is None and on_gpu):
            return pallas_triton.sample(logits, temperature, top_k, top_p, min_p, seed, position, interpret=not on_gpu)
        return xla.sample(logits, temperature, top_k, top_p, min_p, seed, position)
