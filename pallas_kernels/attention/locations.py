"""Where the tokens of a step and those of their sequences are in a paged cache."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Int32

PADDING_PAGE = 0
"""The page that belongs to no row: what is not to be kept is written there."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageLocations:
    """The pages that new tokens are written to, and the pages that hold the sequences (rows) they belong to.

    Row i has the new tokens starts[i] to starts[i + 1], the last of its sequence; tokens past starts[-1] are padding.

    Attributes:
        page: the page that a token's key and value are written to; 0 for a token that is not to be kept.
        offset: the token's place within that page.
        page_table: position j of row i is in page page_table[i, j // page_size]; 0 if no new token attends to it.
        lengths: the tokens of a row, the new ones included; 0 for a padding row.
        starts: where each row's new tokens begin, rising; None if every row has t / r of them: one, or as many as are
            verified.
    """

    page: Int32[Array, " t"]
    offset: Int32[Array, " t"]
    page_table: Int32[Array, "r p"]
    lengths: Int32[Array, " r"]
    starts: Int32[Array, " r+1"] | None = None
