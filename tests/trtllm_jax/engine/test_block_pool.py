from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from trtllm_jax.engine.block_pool import PADDING_PAGE, BlockPool
from trtllm_jax.engine.prefix import block_hash

PAGE_SIZE = 2
CAPACITY = 7

BLOCK = st.tuples(*[st.integers(0, 1)] * PAGE_SIZE)
SALT = st.sampled_from([b"", b"tenant"])


def chain(salt: bytes, blocks: Iterable[Sequence[int]]) -> list[bytes]:
    return list(itertools.accumulate(blocks, block_hash, initial=salt))[1:]


class Observer:
    def __init__(self) -> None:
        self.log: list[tuple[str, bytes]] = []

    def stored(self, parent: bytes, block: bytes, tokens: Sequence[int]) -> None:
        self.log.append(("stored", block))

    def removed(self, block: bytes) -> None:
        self.log.append(("removed", block))


class Held:
    """What one sequence holds; `registered` of its pages were offered to the cache."""

    def __init__(self, salt: bytes, pages: list[int], blocks: list[tuple[int, ...]]) -> None:
        self.salt = salt
        self.pages = pages
        self.blocks = blocks
        self.registered = len(pages)


class PoolAgainstModel(RuleBasedStateMachine):
    """The pool beside lists that are searched: whoever holds a page, what every page holds, and in which order idle
    pages were let go."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.observer = Observer()
        self.pool = BlockPool(CAPACITY + 1, PAGE_SIZE, observer=self.observer)
        self.held: list[Held] = []
        self.content: dict[int, bytes] = {}  # findable pages only
        self.idle: list[int] = []  # longest idle first
        self.log: list[tuple[str, bytes]] = []

    def holders(self, page: int) -> int:
        return sum(sequence.pages.count(page) for sequence in self.held)

    @property
    def free(self) -> int:
        return CAPACITY - len(self.idle) - len({page for sequence in self.held for page in sequence.pages})

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        pages = {block: page for page, block in self.content.items()}
        return [pages[block] for block in itertools.takewhile(pages.__contains__, hashes)]

    @rule(target=sequences, salt=SALT, blocks=st.lists(BLOCK, min_size=1, max_size=4))
    def start(self, salt: bytes, blocks: list[tuple[int, ...]]) -> object:
        """As the scheduler does: match, share what is known, allocate the rest."""
        known = self.pool.match(chain(salt, blocks))
        assert known == self.find(chain(salt, blocks))
        assert self.pool.idle(known) == sum(page in self.idle for page in known)
        if self.pool.available - self.pool.idle(known) < len(blocks) - len(known):
            return multiple()
        self.pool.share(known)
        self.idle = [page for page in self.idle if page not in known]
        sequence = Held(salt, list(known), blocks)
        self.held.append(sequence)
        self.take(sequence, len(blocks) - len(known))
        return sequence

    def take(self, sequence: Held, count: int) -> None:
        evicted = max(count - self.free, 0)
        expected, self.idle = self.idle[:evicted], self.idle[evicted:]
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert PADDING_PAGE not in pages
        assert not any(self.holders(page) or page in self.idle for page in pages)
        assert set(expected) <= set(pages)
        self.log += [("removed", self.content.pop(page)) for page in expected]
        sequence.pages += pages

    @rule(sequence=sequences, block=BLOCK)
    def grow(self, sequence: Held, block: tuple[int, ...]) -> None:
        if self.pool.available:
            sequence.blocks.append(block)
            self.take(sequence, 1)

    @rule(sequence=sequences)
    def register_next(self, sequence: Held) -> None:
        index = sequence.registered
        if index == len(sequence.pages):
            return
        parent, block = [b"", *chain(sequence.salt, sequence.blocks)][index : index + 2]
        page = sequence.pages[index]
        self.pool.register(page, parent, block, sequence.blocks[index])
        sequence.registered += 1
        if block not in self.content.values():
            self.content[page] = block
            self.log.append(("stored", block))

    @rule(sequence=consumes(sequences))
    def release(self, sequence: Held) -> None:
        self.pool.release(sequence.pages)
        self.held.remove(sequence)
        self.idle += [page for page in reversed(sequence.pages) if page in self.content and not self.holders(page)]

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        removed = sorted(self.content.values())
        assert sorted(block for kind, block in self.observer.log[len(self.log) :]) == removed
        self.log = list(self.observer.log)
        self.content.clear()
        self.idle.clear()
        for sequence in self.held:  # their pages hold what is no longer worth finding
            sequence.registered = len(sequence.pages)

    @precondition(lambda self: self.pool.available < CAPACITY)
    @rule()
    def ask_for_too_much(self) -> None:
        with pytest.raises(MemoryError, match="available"):
            self.pool.allocate(self.pool.available + 1)

    @invariant()
    def agrees(self) -> None:
        self.pool.check(sequence.pages for sequence in self.held)
        assert self.pool.available == self.free + len(self.idle)
        assert self.pool.used == CAPACITY - self.pool.available
        assert self.observer.log == self.log
        for page, block in self.content.items():
            assert self.pool.match([block]) == [page]


PoolAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPoolAgainstModel = PoolAgainstModel.TestCase


def finished(pool: BlockPool, blocks: Sequence[Sequence[int]], salt: bytes = b"") -> list[int]:
    """The pages of a sequence that came, was registered and went."""
    pages = pool.allocate(len(blocks))
    hashes = chain(salt, blocks)
    for page, parent, block, tokens in zip(pages, [b"", *hashes], hashes, blocks, strict=False):
        pool.register(page, parent, block, tokens)
    pool.release(pages)
    return pages


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    pool = BlockPool(7, PAGE_SIZE)
    old, new = [(0, 0), (0, 1), (0, 2)], [(1, 0), (1, 1), (1, 2)]
    old_pages, new_pages = finished(pool, old), finished(pool, new)
    assert pool.allocate(4) == [*reversed(old_pages), new_pages[-1]]
    assert pool.match(chain(b"", old)) == []
    assert pool.match(chain(b"", new)) == new_pages[:2]


def test_sharing_a_prefix_makes_it_recently_used() -> None:
    pool = BlockPool(3, PAGE_SIZE)
    (first,), (second,) = finished(pool, [(0, 0)]), finished(pool, [(1, 1)])
    pool.share([first])
    pool.release([first])
    assert pool.allocate(1) == [second]


def test_free_pages_are_taken_before_any_prefix_is_given_up() -> None:
    pool = BlockPool(4, PAGE_SIZE)
    (known,) = finished(pool, [(0, 0)])
    assert known not in pool.allocate(2)
    assert pool.match(chain(b"", [(0, 0)])) == [known]


def test_without_reuse_nothing_is_found() -> None:
    pool = BlockPool(3, PAGE_SIZE, reuse=False)
    finished(pool, [(0, 0)])
    assert pool.match(chain(b"", [(0, 0)])) == []
    pool.check([])


def test_the_first_page_with_some_content_stays_the_one_that_is_found() -> None:
    pool = BlockPool(3, PAGE_SIZE)
    (block,) = chain(b"", [(0, 0)])
    first, second = pool.allocate(2)
    pool.register(first, b"", block, (0, 0))
    pool.register(second, b"", block, (0, 0))
    pool.release([first, second])
    assert pool.match([block]) == [first]
    pool.check([])


@given(
    st.tuples(SALT, st.lists(BLOCK, max_size=3)),
    st.tuples(SALT, st.lists(BLOCK, max_size=3)),
    st.lists(BLOCK, min_size=1, max_size=3),
)
def test_a_chain_tells_salts_and_everything_before_a_block_apart(
    one: tuple[bytes, list[tuple[int, ...]]],
    other: tuple[bytes, list[tuple[int, ...]]],
    tail: list[tuple[int, ...]],
) -> None:
    ends = [chain(salt, [*blocks, *tail])[-1] for salt, blocks in (one, other)]
    assert (ends[0] == ends[1]) == (one == other)


@pytest.mark.parametrize("held", [[], [[1]], [[1, 2], [1]], [[1, 2, 2]]])
def test_check_fails_where_the_holders_are_others(held: list[list[int]]) -> None:
    pool = BlockPool(4, PAGE_SIZE)
    assert sorted(pool.allocate(2)) == [1, 2]
    with pytest.raises(AssertionError):
        pool.check(held)


@pytest.mark.parametrize("place", ["free", "idle"])
def test_check_fails_where_a_held_page_is_elsewhere_too(place: str) -> None:
    pool = BlockPool(4, PAGE_SIZE)
    (page,) = pool.allocate(1)
    pool.register(page, b"", b"hash", (0, 0))
    if place == "free":
        pool._free.append(page)
    else:
        pool._idle[page] = None
    with pytest.raises(AssertionError, match="two places"):
        pool.check([[page]])
