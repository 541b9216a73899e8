"""Attention with linear biases (ALiBi, Press et al. 2021, arXiv:2108.12409): positions without rope or embeddings."""

import numpy as np
from jaxtyping import Float32


def alibi_slopes(heads: int) -> Float32[np.ndarray, "heads 1"]:
    """What the scores of each head fall by with every position: a geometric sequence that ends at 2^-8.

    Where the number of heads is no power of two, the sequence of the power below comes first, and then every other
    element of the sequence of the power above.
    """
    power = 1 << (heads.bit_length() - 1)
    exponents = 8 / power * np.arange(1, power + 1)
    between = 4 / power * np.arange(1, 2 * power + 1, 2)
    return (2.0 ** -np.concatenate([exponents, between])[:heads, None]).astype(np.float32)
