"""What makes two prefixes the same: a hash chain over blocks of tokens, and what else keys and values depend on."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class MediaSpan(NamedTuple):
    """Positions of a prompt whose embeddings come from an image or another input, which a digest identifies."""

    start: int
    end: int
    digest: bytes


def block_hash(parent: bytes, tokens: Sequence[int], media: bytes = b"") -> bytes:
    """The chain hash of a full block: its tokens, the digests of its media, and through `parent` all before them."""
    return hashlib.sha256(parent + array("q", tokens).tobytes() + media).digest()


def chain_start(salt: bytes, adapter: str | None, stretched_length: int | None) -> bytes:
    """What a sequence's chain starts from, which is what all its keys and values depend on besides its tokens.

    Either empty or 64 bytes, and so never the 32 bytes of a block's own hash.

    Args:
        salt: the user's, hashed to 64 bytes; empty for none.
        adapter: the LoRA adapter's name; None for none.
        stretched_length: the prompt's length where rotary embeddings depend on it; None where they do not.
    """
    if adapter is None and stretched_length is None:
        return salt
    parts = (
        salt,
        b"" if adapter is None else adapter.encode(),
        b"" if stretched_length is None else b"%d" % stretched_length,
    )
    return hashlib.sha512(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()


def media_of_block(media: Iterable[MediaSpan], start: int, end: int) -> bytes:
    """What positions `start` to `end` hold of media: digests, and where each lies relative to the block."""
    inside = (span for span in media if span.start < end and span.end > start)
    return b"".join(span.digest + (span.start - start).to_bytes(8, "big", signed=True) for span in inside)
