"""The pages of the KV cache: who holds them, and which finished ones can serve another prompt's prefix.

A full page is found by its block's chain hash (`engine.prefix`). A page is free, held by one or more sequences, or
idle: held by nobody, but still full of a known prefix. Idle pages are the cache, taken back least recently used first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

PADDING_PAGE = 0
"""The page that padding tokens write to; no sequence holds it."""


class CacheObserver(Protocol):
    """Told when a prefix becomes findable and when it is lost."""

    def stored(self, parent: bytes, block: bytes, tokens: Sequence[int]) -> None:
        """A full page became findable under the hash `block`; `parent` is the page's before it, b"" where none is."""

    def removed(self, block: bytes) -> None:
        """The page of the hash `block` was taken for something else."""


class BlockPool:
    """`num_pages` pages of which all but the padding page can be held.

    Args:
        num_pages: pages of the cache, the padding page included.
        page_size: tokens of a page.
        reuse: whether finished pages are kept to be found again.
        observer: notified when a page becomes findable, and when it no longer is; None for nobody.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, reuse: bool = True, observer: CacheObserver | None = None
    ) -> None:
        self.page_size = page_size
        self.capacity = num_pages - 1
        self.reuse = reuse
        self.observer = observer
        self._free = list(range(num_pages - 1, PADDING_PAGE, -1))
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return len(self._holders)

    def find(self, block: bytes) -> int | None:
        """The page that holds a known block; looking it up does not hold it."""
        return self._page_of.get(block)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages of the longest known run of `hashes`, from the first on; looking them up does not hold them."""
        pages: list[int] = []
        for block in hashes:
            page = self._page_of.get(block)
            if page is None:
                break
            pages.append(page)
        return pages

    def idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds, so that sharing them lowers `available`."""
        return sum(page in self._idle for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """Hold known pages once more."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def allocate(self, count: int) -> list[int]:
        """`count` pages with unknown contents, held once; MemoryError when fewer are available."""
        if count > self.available:
            raise MemoryError(f"{count} pages wanted, {self.available} available: the scheduler must ask first")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def _forget(self, page: int) -> None:
        block = self._hash_of.pop(page)
        del self._page_of[block]
        if self.observer:
            self.observer.removed(block)

    def release(self, pages: Sequence[int]) -> None:
        """Let go of held pages; later pages of a prefix become the first to be taken back."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                if page in self._hash_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, parent: bytes, block: bytes, tokens: Sequence[int]) -> None:
        """Make a held, full page findable under `block`, unless another page already is."""
        if self.reuse and block not in self._page_of and page not in self._hash_of:
            self._page_of[block] = page
            self._hash_of[page] = block
            if self.observer:
                self.observer.stored(parent, block, tokens)

    def forget_all(self) -> None:
        """Make every known prefix unfindable, as when the weights change."""
        for page in self._idle:
            self._free.append(page)
        self._idle.clear()
        for page in list(self._hash_of):
            self._forget(page)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the pages of `held` sequences, the idle and the free ones account for every page once."""
        counted: dict[int, int] = {}
        for pages in held:
            for page in pages:
                counted[page] = counted.get(page, 0) + 1
        assert counted == self._holders, f"held {counted}, but the pool counts {self._holders}"
        places: list[Any] = [*self._free, *self._idle, *self._holders]
        assert sorted(places) == list(range(1, self.capacity + 1)), "a page is lost or in two places"
        assert set(self._idle) <= set(self._hash_of), "an idle page has no hash"
        assert {page: block for block, page in self._page_of.items()} == self._hash_of
