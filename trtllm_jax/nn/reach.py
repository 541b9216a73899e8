"""How far back a token reads, for what decides about pages on the host; it knows no jax."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """Which tokens before it a token reads: all of them, or those within one of two limits.

    Attributes:
        window: how many tokens a token reads, itself included; None for no limit.
        chunk: of how many tokens a chunk is, the first of which starts at position 0; a token reads none before its own
            chunk. None for no limit.

    Raises:
        ValueError: there are both.
    """

    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.chunk is not None:
            raise ValueError(f"a token reads window={self.window} or chunk={self.chunk}, not both: leave one None")

    @property
    def most(self) -> int | None:
        """The most tokens that a token reads, itself included; None for no limit."""
        return self.window if self.chunk is None else self.chunk

    def first(self, position: int) -> int:
        """The first position that the token at a position reads."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position + 1 - self.window)


EVERYTHING = Reach()
"""The reach of a token that reads all tokens before it."""
