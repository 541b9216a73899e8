"""What one running sequence holds of the KV cache."""

from dataclasses import dataclass


@dataclass
class Blocks:
    """The pages of a sequence; the cache manager's, which alone changes them.

    Attributes:
        pages: for each cache group its pages by column; `PADDING_PAGE` where they were given back.
        first: for each group the columns before which all were given back.
        weights: which weights, in the manager's count, its contents are computed with.
        tokens: positions that the pages of every group cover.
        registered: leading blocks that were offered for reuse.
    """

    pages: tuple[list[int], ...]
    first: list[int]
    weights: int
    tokens: int = 0
    registered: int = 0
