"""Where a step's tokens and their sequences lie in a paged cache."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageLocations:
    """Which pages take new tokens and which hold their rows; t tokens, r rows (sequences), p pages of a row.

    Row r owns tokens starts[r] to starts[r + 1], its last positions; tokens past starts[-1] are padding.

    Attributes:
        page: int32 [t], the page that takes a token's key and value; 0 for a token that must not be kept.
        offset: int32 [t], the place within that page.
        page_table: int32 [r, p]; position i of row r lives in page page_table[r, i // page_size].
        lengths: int32 [r]; tokens of row r, the new ones included. 0 for a row that is padding.
        starts: int32 [r + 1], rising; None when every row owns exactly t / r tokens: one, or a few that are verified.
    """

    page: jax.Array
    offset: jax.Array
    page_table: jax.Array
    lengths: jax.Array
    starts: jax.Array | None = None
