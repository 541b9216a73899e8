"""The public functions that choose tokens, and the choice between their implementations."""

from typing import Literal

import jax
from jaxtyping import Array, Float, Float32, Int32, UInt32

from pallas_kernels.devices import Platform
from pallas_kernels.sampling import pallas_triton, xla


def greedy(logits: Float[Array, "r v"]) -> Int32[Array, " r"]:
    """The likeliest token of each row; of equally likely ones the lowest id."""
    return xla.greedy(logits)


def sample(
    logits: Float[Array, "r v"],
    *,
    temperature: Float32[Array, " r"],
    top_k: Int32[Array, " r"],
    top_p: Float32[Array, " r"],
    min_p: Float32[Array, " r"],
    seed: UInt32[Array, "r 2"],
    position: Int32[Array, " r"],
    implementation: Literal["xla", "triton"] | None = None,
    platform: Platform | None = None,
) -> Int32[Array, " r"]:
    """A token for each row: temperature, then top-k, top-p and min-p, then a random choice among the tokens left.

    The choice depends only on the row's logits and parameters, never on the rest of the batch. It uses the Gumbel-max
    trick (Gumbel 1954): the argmax of scores plus independent noise has the softmax's distribution, and a token's noise
    depends only on its id, the seed and the position. All ties at a threshold are kept. A token whose logit is minus
    infinity is never chosen; a row that has no other gives token 0.

    Args:
        logits: float32 or bfloat16.
        temperature: 0 gives the likeliest token, and of equally likely ones the lowest id.
        top_k: how many of the likeliest tokens to keep; 0 keeps all.
        top_p: keeps the smallest set of likeliest tokens that has at least this share of the probability left by top-k
            (Holtzman et al. 2020, arXiv:1904.09751), up to the rounding of float32 sums. 1 keeps all.
        min_p: keeps the tokens whose probability is at least this fraction of the likeliest token's (Nguyen et al.
            2024, arXiv:2407.01082). 0 keeps all.
        seed: the high and the low word of each row's seed.
        position: the place that the token will have in its sequence.
        implementation: None takes the kernel on a GPU and XLA elsewhere. Without a GPU the kernel is interpreted.
        platform: the one that computes it; None for JAX's default backend.
    """
    on_gpu = (platform or Platform.default()).on_gpu
    with jax.named_scope("sample"):
        if implementation == "triton" or (implementation is None and on_gpu):
            return pallas_triton.sample(logits, temperature, top_k, top_p, min_p, seed, position, interpret=not on_gpu)
        return xla.sample(logits, temperature, top_k, top_p, min_p, seed, position)
