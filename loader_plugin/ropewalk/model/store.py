"""The pages of one model: taken from the backend's pool for its caches, shared through the prefix tree.

A format with a recent window has pages in float16 besides (model/recent.py): a step reserves as many as its rows need
at once, and slides over them chunk by chunk.

One lock guards the tree, the lists of pages and who holds them, so that one thread may share or attach prefixes while
another computes a step. A page is written only by the step of the one cache that holds it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch

from ropewalk.backends.protocol import PAGE_TOKENS, Page, PagePool
from ropewalk.base.errors import CacheFullError
from ropewalk.base.memory import format_bytes
from ropewalk.config.cache_format import CacheFormat
from ropewalk.model.cache import HeldPage, KvCache, Origin, num_pages
from ropewalk.model.kept import KeptCaches
from ropewalk.model.prefixes import PrefixTree
from ropewalk.model.recent import RecentPages, continuable

EVICTED_PARTS = 32  # prefixes go by this part of the pool at least: finding the oldest looks at all of them

Holders = dict[HeldPage, list[Hashable]]  # pages, and what each of their caches is going to write there
Wanted = Sequence[tuple[KvCache, int]]  # caches, and the length that each is to reach


class PageStore:
    """Pages for caches of one model, with keys and values for so many layer instances each."""

    def __init__(self, pool: PagePool, cache_format: CacheFormat, num_instances: int, chunk_rows: int) -> None:
        self.lock = threading.RLock()
        self.num_instances = num_instances  # of the pages that are taken from now on
        self.chunk_rows = chunk_rows  # the most rows of a sequence that are computed at once
        self._pool = pool
        self._recent = RecentPages(pool, cache_format)
        self._tree = PrefixTree()
        self.kept = KeptCaches()

    @property
    def page_bytes(self) -> int:
        """Memory of a page."""
        return self._pool.page_bytes(self.num_instances)

    def bytes_of(self, length: int) -> int:
        """Memory of the pages of a cache of so many positions."""
        recent = self._recent.num_held(length) * self._recent.page_bytes(self.num_instances)
        return num_pages(length) * self.page_bytes + recent

    @property
    def layout(self) -> str:
        """A name for the bytes of a page: equal names, equal layouts."""
        return self._pool.layout

    def parts_of(self, held: HeldPage) -> list[torch.Tensor]:
        """The memory of a page, [bytes] uint8 in each place that holds a part of it: to save it, or to restore it."""
        return self._pool.parts_of(held.page)

    def written_(self, held: HeldPage, parts: list[torch.Tensor]) -> None:
        """What `parts_of` gave has been written to."""
        self._pool.written_(held.page, parts)

    @property
    def num_bytes(self) -> int:
        """The limit of all pages together."""
        return self._pool.num_bytes

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use, by caches or by the tree."""
        return self._pool.used_bytes

    @property
    def shared_bytes(self) -> int:
        """Memory of the pages that only the tree holds, or caches that are kept for later."""
        with self.lock:
            return self._idle_bytes

    @property
    def _idle_bytes(self) -> int:
        return self._tree.idle_bytes + self.kept.idle_bytes

    def missing_bytes(self, wanted: Wanted) -> int:
        """What is missing even if the tree forgets all it can; 0 if caches can grow to these lengths."""
        with self.lock:
            needed = self._needed(wanted)
            free = self._pool.num_bytes - self._pool.used_bytes
            if needed <= free:
                return 0
            # One of the caches need not copy such a page once the tree has forgotten it.
            unshared = self.page_bytes * len(_forgettable(wanted))
            return max(0, needed - unshared - free - self._idle_bytes)

    def reserve_(self, wanted: Wanted) -> None:
        """Give every cache the pages to grow to its length, and a page of its own to write to next; or change none.

        Raises:
            CacheFullError: there are not so many pages, even if the tree forgets all that no cache holds.
        """
        with self.lock:
            if self.missing_bytes(wanted):
                raise CacheFullError(self._full(wanted))
            self._make_room(self._needed(wanted))
            if self._needed(wanted) > self._pool.num_bytes - self._pool.used_bytes:
                for held in _forgettable(wanted):
                    self._tree.forget(held)
            before = [(cache, cache.pages, cache.recent) for cache, _ in wanted]
            try:
                for cache, length in wanted:
                    self._grow_(cache, length)
                    self._recent.reserve_(cache, length, self.chunk_rows, self.num_instances)
            except MemoryError as error:  # the machine has less than the limit
                for cache, pages, recent in before:
                    cache.hold_(pages, recent)
                raise CacheFullError(self._full(wanted)) from error

    def take_(self, cache: KvCache, length: int, recent: Sequence[int]) -> None:
        """Give an empty cache the pages of so many positions, and these in float16, to be filled from a file.

        Raises:
            CacheFullError: as `reserve_`. The cache is as it was.
        """
        with self.lock:
            count, exact_bytes = self.num_instances, self._recent.page_bytes(self.num_instances)
            needed = num_pages(length) * self.page_bytes + len(recent) * exact_bytes
            if needed > self._pool.num_bytes - self._pool.used_bytes + self._tree.idle_bytes:
                raise CacheFullError(self._full([(cache, length)]))
            self._make_room(needed)
            try:
                pages = [HeldPage(self._pool.take(count), self.page_bytes) for _ in range(num_pages(length))]
                exact = {index: HeldPage(self._pool.take(count, recent=True), exact_bytes) for index in recent}
            except MemoryError as error:  # the machine has less than the limit
                raise CacheFullError(self._full([(cache, length)])) from error
            cache.hold_(pages, exact)

    def slide_(self, cache: KvCache, end: int) -> None:
        """Before rows up to position `end` are computed: the pages that they write in float16, of those reserved."""
        if cache.cache_format.recent:
            with self.lock:
                self._recent.slide_(cache, end)

    def settle_(self, cache: KvCache) -> None:
        """A step is over: what the cache does not need goes back."""
        with self.lock:
            cache.give_back_()
            self._recent.release_(cache)

    def own_(self, wanted: Sequence[tuple[KvCache, Hashable]]) -> None:
        """Give each cache pages that can be written: shared ones are copied.

        wanted: caches, and what is going to be written: those with equal texts keep the pages that they share.

        Raises:
            CacheFullError: there is no memory for the copies. All caches are as they were.
        """
        with self.lock:
            copies = self._copies(lambda: _holders(wanted), "to be turned")
            copied = {key: HeldPage(page, key[0].num_bytes) for key, page in copies}
            for cache, text in wanted:
                pages = [copied.get((held, text), held) for held in cache.pages]
                recent = {index: copied.get((held, text), held) for index, held in cache.recent.items()}
                cache.hold_(pages, recent)

    def targets_of(self, cache: KvCache, start: int, end: int) -> tuple[list[HeldPage], dict[int, HeldPage]]:
        """The pages for positions 0..end of a cache, of which those from `start` on are going to be written, and new
        ones in float16 for the window before the next token.

        Pages that anybody else holds are replaced; what is before `start` is copied. The cache is as it was.

        Raises:
            CacheFullError: there is no memory for other pages.
        """
        first, exact = start // PAGE_TOKENS, cache.exact_pages(end, end)
        size = self._recent.page_bytes(self.num_instances)
        with self.lock:
            kept = cache.pages[: num_pages(end)]
            copies = self._copies(lambda: {held: [None] for held in kept[first:]}, "to be shifted", size * len(exact))
            copied = {held: page for (held, _), page in copies}
            try:
                recent = {index: HeldPage(self._pool.take(self.num_instances, recent=True), size) for index in exact}
            except MemoryError as error:
                raise CacheFullError(_no_copies(len(exact), "in float16 are needed", size * len(exact))) from error
            return [HeldPage(copied[held], held.num_bytes) if held in copied else held for held in kept], recent

    def _copies(
        self, holders: Callable[[], Holders], purpose: str, besides: int = 0
    ) -> list[tuple[tuple[HeldPage, Hashable], Page]]:
        """Copies of the pages that others hold, one for each text, with memory that the tree can do without.

        besides: bytes that are going to be needed, too.

        Raises:
            CacheFullError: there is not so much.
        """
        needed = sum(held.num_bytes for held, _ in _shared(holders())) + besides
        self._make_room(needed)
        found = holders()  # a kept cache may have gone
        if needed > self._pool.num_bytes - self._pool.used_bytes:
            for held in [held for held in found if held.in_tree and _is_whole(held, found[held])]:
                if held.in_tree:  # else it went with one before it
                    self._tree.forget(held)
        shared = _shared(found)
        try:
            return [(key, self._pool.copy(key[0].page)) for key in shared]
        except MemoryError as error:
            needed = sum(held.num_bytes for held, _ in shared)
            raise CacheFullError(
                _no_copies(len(shared), f"{purpose} are shared with other sequences", needed)
            ) from error

    def share(self, cache: KvCache) -> None:
        """Keep what the cache holds for others, as far as all of it was computed in one way."""
        first = cache.first_segment
        if first is not None and not first.origin.moves:
            with self.lock:
                self._tree.add(cache, cache.same_origin(first.origin), self._copied_if_room)

    def attach(self, cache: KvCache, token_ids: Sequence[int], origin: Origin, seq_len: int) -> None:
        """Extend the cache by what the tree has of the tokens that follow: full pages shared, the last as a copy.

        The cache holds a prefix of `token_ids`, all of that origin.
        """
        with self.lock:
            found = continuable(cache, self._tree.find(cache.layer_order, origin, token_ids))
            pages, length = list(cache.pages), cache.length
            for index, (node, agreeing) in enumerate(found):
                end = index * PAGE_TOKENS + agreeing
                if end <= length:
                    continue
                mine = node.held if agreeing == PAGE_TOKENS else self._copied_if_room(node.held)
                if mine is None:
                    break
                pages[index:] = [mine]
                length = end
            if length == cache.length:
                return
            recent = self._recent.attached(cache, found, length, self._copied_if_room)
            if recent is not None:
                cache.hold_(pages, recent)
                cache.record_(token_ids[cache.length : length], origin, seq_len)

    def shared_length(self, cache: KvCache, token_ids: Sequence[int], origin: Origin) -> int:
        """How many leading positions of these tokens an empty cache can attach to."""
        with self.lock:
            found = continuable(cache, self._tree.find(cache.layer_order, origin, token_ids))
            return sum(agreeing for _, agreeing in found)

    def _needed(self, wanted: Wanted) -> int:
        """Memory of the pages that these caches lack."""
        added = sum(max(0, num_pages(length) - len(cache.pages)) for cache, length in wanted)
        copies = sum(count - _is_theirs(held, count) for held, count in _written(wanted).items())
        recent = sum(self._recent.num_lacking(cache, length, self.chunk_rows) for cache, length in wanted)
        return self.page_bytes * (added + copies) + self._recent.page_bytes(self.num_instances) * recent

    def _make_room(self, num_bytes: int, before: int | None = None) -> None:
        self._evict(num_bytes, before)
        while num_bytes > self._pool.num_bytes - self._pool.used_bytes and self.kept.drop_oldest():
            self._evict(num_bytes, before)

    def _evict(self, num_bytes: int, before: int | None) -> None:
        short = num_bytes - (self._pool.num_bytes - self._pool.used_bytes)
        if short > 0:
            self._tree.evict(max(short, self._pool.num_bytes // EVICTED_PARTS), before)

    def _grow_(self, cache: KvCache, length: int) -> None:
        if _must_copy(cache):
            index = cache.length // PAGE_TOKENS
            copy = HeldPage(self._pool.copy(cache.pages[index].page), cache.pages[index].num_bytes)
            cache.hold_((*cache.pages[:index], copy, *cache.pages[index + 1 :]))
        added = range(num_pages(length) - len(cache.pages))
        new = [HeldPage(self._pool.take(self.num_instances), self.page_bytes) for _ in added]
        if new:
            cache.hold_((*cache.pages, *new))

    def _copied_if_room(self, held: HeldPage) -> HeldPage | None:
        """A copy of a page; None if there is no memory for it without what was of use just now."""
        self._make_room(held.num_bytes, before=self._tree.moment)
        try:
            return HeldPage(self._pool.copy(held.page), held.num_bytes)
        except MemoryError:
            return None

    def _full(self, wanted: Wanted) -> str:
        needed, missing = self._needed(wanted), self.missing_bytes(wanted)
        free = self._pool.num_bytes - self._pool.used_bytes + self._idle_bytes
        short = f"{format_bytes(missing)} too few" if missing else "and the machine has no more memory"
        return (
            f"the cache is full: {format_bytes(needed)} are needed for {len(wanted)} "
            f"{'sequence' if len(wanted) == 1 else 'sequences'}, and {format_bytes(free)} of "
            f"{format_bytes(self._pool.num_bytes)} are free or only hold prefixes for later, {short}; truncate or drop "
            "other caches, give fewer tokens, or load the model with a larger cache_memory"
        )


def _holders(wanted: Sequence[tuple[KvCache, Hashable]]) -> Holders:
    """The pages of these caches, of both kinds, each with what is to be written by which of them."""
    found: Holders = {}
    for cache, text in wanted:
        for held in (*cache.pages, *cache.recent.values()):
            found.setdefault(held, []).append(text)
    return found


def _no_copies(number: int, what: str, num_bytes: int) -> str:
    return (
        f"the cache is full: {number} pages {what}, and there is no memory for copies of them "
        f"({format_bytes(num_bytes)}): drop other caches, or load the model with a larger cache_memory"
    )


def _is_whole(held: HeldPage, texts: Sequence[Hashable]) -> bool:
    """Whether these are all the caches that hold a page, and all write the same."""
    return len(texts) == len(held.caches) and len(set(texts)) == 1


def _shared(holders: Holders) -> list[tuple[HeldPage, Hashable]]:
    """The pages that cannot be written as they are, once for each text."""
    return [
        (held, text)
        for held, texts in holders.items()
        if held.in_tree or not _is_whole(held, texts)
        for text in dict.fromkeys(texts)
    ]


def _next_page(cache: KvCache) -> HeldPage | None:
    """The page that the next token is written to, if the cache holds a part of it already."""
    return cache.pages[cache.length // PAGE_TOKENS] if cache.length % PAGE_TOKENS else None


def _must_copy(cache: KvCache) -> bool:
    held = _next_page(cache)
    return held is not None and (held.in_tree or len(held.caches) > 1)


def _written(wanted: Wanted) -> Counter[HeldPage]:
    """The pages with a part of them filled that these caches write to next, each with the number of those caches."""
    pages = (_next_page(cache) for cache, _ in wanted)
    return Counter(held for held in pages if held is not None)


def _is_theirs(held: HeldPage, count: int) -> bool:
    """Whether so many caches are all that hold a page: when the others have copies, the last can write to it."""
    return not held.in_tree and count == len(held.caches)


def _forgettable(wanted: Wanted) -> list[HeldPage]:
    """Pages that all of these caches must copy only because the tree holds them as well."""
    return [held for held, count in _written(wanted).items() if held.in_tree and count == len(held.caches)]
