"""The KV cache on the host: which pages each sequence holds in each cache group, and what a prompt finds there already.

Layers whose caches are allocated, freed and reused together are a cache group. Each group has its own pool of pages and
its own page table. The scheduler asks in tokens; this module alone computes in pages, and knows no jax.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trtllm_jax.engine.block_pool import PADDING_PAGE, BlockPool
from trtllm_jax.engine.blocks import Blocks
from trtllm_jax.engine.limits import SchedulerLimits
from trtllm_jax.engine.prefix import block_hash, chain_start, media_of_block
from trtllm_jax.engine.request import Request
from trtllm_jax.nn.reach import EVERYTHING, Reach

Copy = tuple[int, int]
"""A page whose contents are copied, and the page that takes them."""


def pages_per_dispatch(limits: SchedulerLimits, page_size: int) -> int:
    """The most pages that a row gains in one decode dispatch."""
    return -(-limits.max_decode_tokens // page_size)


def read_pages(most: int, tokens: int, page_size: int) -> int:
    """The most pages that so many consecutive tokens read, of which each reads `most` tokens, itself included."""
    return 1 - (-(most - 1 + tokens) // page_size)


def steady_pages(most: int, limits: SchedulerLimits, page_size: int) -> int:
    """The most pages that a sequence holds when it computes no prompt, where each token reads `most` tokens."""
    # Between the bounds of a dispatch in flight lie tokens that may or may not be computed, and what the token before
    # them reads is kept for forks. One page is for a part of a prompt that does not fill whole pages.
    in_flight = limits.max_decode_tokens - limits.max_decode_steps
    return read_pages(most, limits.max_decode_tokens + in_flight + 1, page_size) + 1


def prompt_pages(limits: SchedulerLimits, page_size: int) -> int:
    """The most pages that all sequences together hold beyond that, for the prompts of one step."""
    return -(-limits.max_num_tokens // page_size)


def pool_pages(reach: Reach, columns: int, limits: SchedulerLimits, page_size: int) -> int:
    """The pages of a group, the padding page included, beside so many of a group that keeps all tokens.

    A group of limited reach has no more than all sequences together hold, which does not grow with their length.
    """
    if reach.most is None:
        return columns
    held = limits.max_batch_size * steady_pages(reach.most, limits, page_size) + prompt_pages(limits, page_size)
    return min(columns, 1 + held)


class Prefix(NamedTuple):
    """What the cache already has of a waiting sequence's beginning; matching does not hold it.

    Attributes:
        tokens: how many leading tokens.
        pages: for each group the pages by column; `PADDING_PAGE` where no later token reads the column.
        partial: for each group a page that is full in part and has to be copied; None where there is none.
    """

    tokens: int
    pages: tuple[list[int], ...]
    partial: tuple[int, ...] | None = None


@dataclass
class CacheStats:
    """Counts of pages, for the iteration statistics: of the first group that keeps every token, else of the first."""

    capacity: int
    available: int
    used: int
    page_size: int
    allocated: int
    reused: int
    missed: int


class Group:
    """One group's pool, its page table, and what its running sequences may still ask for.

    Args:
        pool: the pages.
        reach: which tokens a token reads.
    """

    def __init__(self, pool: BlockPool, reach: Reach = EVERYTHING) -> None:
        self.pool = pool
        self.reach = reach
        self.table = np.zeros((0, 0), np.int32)
        self.reserved = 0
        """Pages promised to running sequences: those still to come where all are kept, else their steady pages."""
        self.unreserved = 0
        """Where the reach is limited, the other pages of running sequences, of which prompts need some for a step."""

    @property
    def keeps_all(self) -> bool:
        """Whether a token reads all before it, so that a running sequence keeps all its pages."""
        return self.reach.most is None

    def first_column(self, position: int) -> int:
        """The column of the first page that the token at a position reads."""
        return self.reach.first(position) // self.pool.page_size

    def peak(self, tokens: int, step_tokens: int) -> int:
        """The most pages that a sequence of so many tokens holds at once, with steps of at most `step_tokens`.

        Those of the token before a step are held too.
        """
        every, most = -(-tokens // self.pool.page_size), self.reach.most
        return every if most is None else min(every, read_pages(most, step_tokens + 1, self.pool.page_size))

    def promise(self, tokens: int, limits: SchedulerLimits, sign: int = 1) -> tuple[int, int]:
        """What is reserved and not, once a sequence of so many tokens joins a group of limited reach, or leaves."""
        every, most = -(-tokens // self.pool.page_size), self.reach.most
        assert most is not None
        steady = min(every, steady_pages(most, limits, self.pool.page_size))
        return self.reserved + sign * steady, self.unreserved + sign * (every - steady)


class KVCacheManager:
    """Gives pages to sequences and takes them back; used from one thread.

    Args:
        limits: of the steps.
        groups: the model's cache groups, with pools of one page size.
        rope_stretch: the longest sequence whose keys depend on nothing but the tokens before them; those of a longer
            prompt depend on its length as well. None where there is no such bound.
    """

    def __init__(self, limits: SchedulerLimits, groups: Sequence[Group], rope_stretch: int | None = None) -> None:
        self._groups = tuple(groups)
        self._counted = counted_group(groups)
        self._page_size = groups[0].pool.page_size
        self._reuse = groups[0].pool.reuse
        self._rope_stretch = rope_stretch
        self._limits = limits
        self._beyond_steady: list[Request] = []
        """Sequences that hold more than steady pages of some group since the last plan."""
        self._pages_per_dispatch = pages_per_dispatch(limits, self._page_size)
        self._weights = 0
        self._allocated = self._reused = self._missed = 0
        for group in groups:
            group.table = np.zeros((limits.max_batch_size, self._pages_for(limits.max_seq_len)), np.int32)

    @property
    def stats(self) -> CacheStats:
        """What is held and free now, and what was since the start."""
        pool = self._counted.pool
        return CacheStats(
            capacity=pool.capacity,
            available=pool.available,
            used=pool.used,
            page_size=self._page_size,
            allocated=self._allocated,
            reused=self._reused,
            missed=self._missed,
        )

    # ---- a waiting sequence ----

    def match(self, request: Request) -> Prefix:
        """The longest beginning that every group still holds, or all of it that a running first sample has.

        At least one token is left to compute, because its logits give the next one.
        """
        forked = self._fork(request)
        if forked is not None:
            return forked
        nothing = Prefix(0, tuple([] for _ in self._groups))
        if not self._reuse or request.reports_context:
            return nothing
        blocks = (request.total - 1) // self._page_size
        self._extend_hashes(request, blocks)
        hashes = request.hashes[:blocks]
        blocks = self._longest(hashes)
        if not blocks:
            return nothing
        tokens = blocks * self._page_size
        return Prefix(tokens, tuple(self._known(group, hashes[:blocks], tokens) for group in self._groups))

    def can_admit(self, request: Request, prefix: Prefix, *, to_its_end: bool, spare: int) -> bool:
        """Whether a waiting sequence's known tokens fit, and with `to_its_end` all that it may become.

        Otherwise so many `spare` pages have to remain, which keep the admission from being undone at once.
        """
        return all(
            self._group_admits(group, request, pages, to_its_end, spare)
            for group, pages in zip(self._groups, prefix.pages, strict=True)
        )

    def allocate(self, request: Request, prefix: Prefix) -> list[list[Copy]]:
        """Hold a prefix and pages for what follows it; returns the pages to copy for it, by group.

        The sequence has a slot already.
        """
        blocks = Blocks(tuple(map(list, prefix.pages)), [0] * len(self._groups), self._weights)
        request.blocks = blocks
        blocks.registered = len(prefix.pages[0])
        copies: list[list[Copy]] = [[] for _ in self._groups]
        for index, group in enumerate(self._groups):
            known = prefix.pages[index]
            group.pool.share([page for page in known if page != PADDING_PAGE])
            group.table[request.slot] = PADDING_PAGE
            group.table[request.slot, : len(known)] = known
            blocks.first[index] = min(group.first_column(prefix.tokens), len(known))
            if group.keeps_all:
                group.reserved += self._pages_for(request.limit) - len(known)
                self._hold(request, index, self._pages_for(request.total))
            else:
                group.reserved, group.unreserved = group.promise(request.limit, self._limits)
            if prefix.partial is not None:
                column = prefix.tokens // self._page_size
                self._hold(request, index, column + 1)
                copies[index].append((prefix.partial[index], blocks.pages[index][column]))
        if request.cached_tokens is None:
            reused = len(prefix.pages[0])
            self._reused += reused
            self._missed += self._pages_for(request.total) - reused
        self._cover(blocks)
        return copies

    def _group_admits(self, group: Group, request: Request, known: Sequence[int], to_its_end: bool, spare: int) -> bool:
        held = [page for page in known if page != PADDING_PAGE]
        room = group.pool.available - group.pool.idle(held)
        now = group.peak(request.total, self._limits.max_step_tokens) - len(held)
        if not to_its_end:
            return room >= now + spare
        if group.keeps_all:
            return room >= group.reserved + self._pages_for(request.limit) - len(known)
        # Whatever sequences share, each holds no more than its own pages.
        reserved, unreserved = group.promise(request.limit, self._limits)
        return reserved + min(unreserved, prompt_pages(self._limits, self._page_size)) <= group.pool.capacity

    def _fork(self, request: Request) -> Prefix | None:
        """What the first of several samples has of their prompt, where it still holds all that the others read."""
        parent = request.parent
        if parent is None or parent.blocks is None or request.generated or not self._is_current(parent):
            return None
        tokens = request.total - 1
        full, rest = divmod(tokens, self._page_size)
        first = [group.first_column(tokens) for group in self._groups]
        if any(held > needed for held, needed in zip(parent.blocks.first, first, strict=True)):
            return None
        pages = tuple(
            [PADDING_PAGE] * min(column, full) + held[column:full]
            for held, column in zip(parent.blocks.pages, first, strict=True)
        )
        return Prefix(tokens, pages, tuple(held[full] for held in parent.blocks.pages) if rest else None)

    def _longest(self, hashes: Sequence[bytes]) -> int:
        """The most leading blocks of which every group has what the token after them reads."""
        longest = len(hashes)
        for group in self._groups:
            if group.keeps_all:
                longest = min(longest, len(group.pool.match(hashes[:longest])))
        limited = [group for group in self._groups if not group.keeps_all]
        unbroken = [list(_unbroken(group.pool, hashes[:longest])) for group in limited]
        for blocks in range(longest, 0, -1):
            first = (group.first_column(blocks * self._page_size) for group in limited)
            if all(known[blocks - 1] >= blocks - column for known, column in zip(unbroken, first, strict=True)):
                return blocks
        return 0

    def _known(self, group: Group, hashes: Sequence[bytes], tokens: int) -> list[int]:
        """The pages of known blocks, but for those that no token from `tokens` on reads."""
        first = min(group.first_column(tokens), len(hashes))
        pages = [page for page in map(group.pool.find, hashes[first:]) if page is not None]
        return [PADDING_PAGE] * first + pages

    # ---- a running sequence ----

    def begin_plan(self) -> None:
        """Take back what prompts of the last plan needed for one step."""
        for request in self._beyond_steady:
            if request.blocks is not None:
                self._give_back_unread(request, request.computed_min)
        self._beyond_steady.clear()

    def grow(self, request: Request, first: int, end: int) -> bool:
        """Hold pages for positions up to `end`, the next to be computed being `first`; False if the pools lack them.

        Pages that no token from `first` on reads are given back first, whether or not the others are there.
        """
        return _held(request).tokens >= end or self.grow_all({request: (first, end)})

    def grow_all(self, goals: Mapping[Request, tuple[int, int]]) -> bool:
        """`grow` for several sequences, of which all get their pages or none."""
        for request, (first, _) in goals.items():
            self._give_back_unread(request, first)
        short = [
            (request, index, pages)
            for request, (_, end) in goals.items()
            for index, pages in self._missing(request, end)
        ]
        for index, group in enumerate(self._groups):
            if sum(pages for _, of, pages in short if of == index) > group.pool.available:
                return False
        for request, index, pages in short:
            assert request.blocks is not None
            self._hold(request, index, len(request.blocks.pages[index]) + pages)
            if request.prefilling and not self._groups[index].keeps_all:
                self._beyond_steady.append(request)
        for request in goals:
            self._cover(_held(request))
        return True

    def register(self, request: Request, tokens: int) -> None:
        """Make the full blocks among the first `tokens` known and computed tokens findable."""
        blocks, held = tokens // self._page_size, request.blocks
        if held is None or not self._reuse or blocks <= held.registered or not self._is_current(request):
            return
        self._extend_hashes(request, blocks)
        for column in range(held.registered, blocks):
            parent = request.hashes[column - 1] if column else b""
            known = request.tokens(column * self._page_size, (column + 1) * self._page_size)
            for group, pages in zip(self._groups, held.pages, strict=True):
                if pages[column] != PADDING_PAGE:
                    group.pool.register(pages[column], parent, request.hashes[column], known)
        held.registered = blocks

    def free(self, request: Request) -> None:
        """Take a sequence's pages back."""
        assert request.blocks is not None
        for group, pages in zip(self._groups, request.blocks.pages, strict=True):
            if group.keeps_all:
                group.reserved -= self._pages_for(request.limit) - len(pages)
            else:
                group.reserved, group.unreserved = group.promise(request.limit, self._limits, -1)
            group.pool.release([page for page in pages if page != PADDING_PAGE])
        request.blocks = None

    def begin_weights(self) -> None:
        """From the next plan on other weights compute: what is cached serves only the sequences that hold it."""
        self._weights += 1
        for group in self._groups:
            group.pool.forget_all()

    def page_tables(self, slots: np.ndarray) -> tuple[np.ndarray, ...]:
        """For each group the page table [r, p] of the rows in these slots."""
        return tuple(group.table[slots] for group in self._groups)

    def newest_pages(self, requests: Sequence[Request], slots: np.ndarray) -> tuple[np.ndarray, ...]:
        """For each group the last columns of each row and their pages [r, n, 2], as many as a dispatch may add."""
        return tuple(self._newest(index, requests, slots) for index in range(len(self._groups)))

    def _newest(self, index: int, requests: Sequence[Request], slots: np.ndarray) -> np.ndarray:
        held = np.fromiter((len(request.blocks.pages[index]) for request in requests), np.int32, len(requests))  # type: ignore[union-attr]
        columns = np.maximum(held[:, None] - np.arange(self._pages_per_dispatch, 0, -1), 0)
        return np.stack([columns, self._groups[index].table[slots[:, None], columns]], axis=2)

    def _missing(self, request: Request, end: int) -> Iterator[tuple[int, int]]:
        """The groups in which a sequence lacks pages for positions up to `end`, and how many."""
        for index, pages in enumerate(_held(request).pages):
            if (lacking := self._pages_for(end) - len(pages)) > 0:
                yield index, lacking

    def _give_back_unread(self, request: Request, position: int) -> None:
        """Let go of the pages that no token from a position on reads, in the groups of limited reach.

        Those of the token before it are kept: a fork that starts there computes that token again.
        """
        for index, group in enumerate(self._groups):
            if not group.keeps_all:
                self._give_back(request, index, group.first_column(max(position - 1, 0)))

    def _give_back(self, request: Request, index: int, column: int) -> None:
        """Let go of the pages before a column, which no later token reads."""
        held, group = _held(request), self._groups[index]
        last = min(column, len(held.pages[index]))
        columns = range(held.first[index], last)
        group.pool.release([held.pages[index][each] for each in columns])
        for each in columns:
            held.pages[index][each] = PADDING_PAGE
            group.table[request.slot, each] = PADDING_PAGE
        held.first[index] = max(held.first[index], last)

    def _hold(self, request: Request, index: int, pages: int) -> None:
        """Give a running sequence pages until it has so many columns; the caller knows that there are enough."""
        held, group = _held(request).pages[index], self._groups[index]
        count = pages - len(held)
        if count <= 0:
            return
        held += group.pool.allocate(count)
        group.table[request.slot, pages - count : pages] = held[pages - count :]
        if group is self._counted:
            self._allocated += count
        if group.keeps_all:
            group.reserved -= count

    def _cover(self, blocks: Blocks) -> None:
        blocks.tokens = min(map(len, blocks.pages)) * self._page_size

    def _extend_hashes(self, request: Request, blocks: int) -> None:
        for column in range(len(request.hashes), blocks):
            start, end = column * self._page_size, (column + 1) * self._page_size
            parent = request.hashes[-1] if column else self._chain_start(request)
            media = media_of_block(request.media, start, end) if request.media else b""
            request.hashes.append(block_hash(parent, request.tokens(start, end), media))

    def _chain_start(self, request: Request) -> bytes:
        length = len(request.prompt)
        stretched = self._rope_stretch is not None and length > self._rope_stretch
        return chain_start(request.salt, request.adapter, length if stretched else None)

    def _is_current(self, request: Request) -> bool:
        """Whether all that a running sequence holds is computed with the weights of the next plan."""
        return _held(request).weights == self._weights

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def check(self, running: Sequence[Request]) -> None:
        """Assert that every page of every group is accounted for once."""
        for index, group in enumerate(self._groups):
            held = [[page for page in _held(request).pages[index] if page != PADDING_PAGE] for request in running]
            group.pool.check(held)


def counted_group(groups: Sequence[Group]) -> Group:
    """The group whose pages statistics and events are about."""
    return next((group for group in groups if group.keeps_all), groups[0])


def _held(request: Request) -> Blocks:
    assert request.blocks is not None, "the sequence does not run"
    return request.blocks


def _unbroken(pool: BlockPool, hashes: Sequence[bytes]) -> Iterator[int]:
    """For each block how many known ones in a row end with it."""
    length = 0
    for block in hashes:
        length = 0 if pool.find(block) is None else length + 1
        yield length
