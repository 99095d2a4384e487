"""The pages in float16 of a cache format with a recent window: which a cache needs, takes, and lets go.

A sequence needs them for the window before its next token and for the rows that are computed at once:

    codes       | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |
    float16                     | 4 | 5 | 6 | 7 | 8 |      rows of a chunk in 6 to 8, which read 4 and 5 before them

A long prompt slides over them: pages that a chunk leaves behind are written again for the next, unless the prefix tree
or another cache holds them. So many as that takes are reserved before a step begins, and none is taken within it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

from ropewalk.backends.protocol import PAGE_TOKENS, PagePool
from ropewalk.config.cache_format import CacheFormat
from ropewalk.model.cache import KEPT_BACK, HeldPage, KvCache, num_pages
from ropewalk.model.prefixes import Node


def window_pages(cache_format: CacheFormat, length: int) -> int:
    """The pages in float16 that a sequence of so many positions holds between steps, at most."""
    return min(num_pages(length), num_pages(cache_format.recent + KEPT_BACK) + 1) if cache_format.recent else 0


def most_pages(cache_format: CacheFormat, length: int, chunk_rows: int) -> int:
    """The pages in float16 that a sequence of so many positions has at most, with those that a step reserves."""
    if not cache_format.recent:
        return 0
    reserved = min(num_pages(length), num_pages(cache_format.recent + min(chunk_rows, length)) + 2)
    return window_pages(cache_format, length) + reserved + 1


class RecentPages:
    """Takes them from a pool. Its methods are called under the lock of the store."""

    def __init__(self, pool: PagePool, cache_format: CacheFormat) -> None:
        self._pool = pool
        self._format = cache_format
        self._reserved: weakref.WeakKeyDictionary[KvCache, list[HeldPage]] = weakref.WeakKeyDictionary()

    def page_bytes(self, num_instances: int) -> int:
        """Memory of such a page; 0 where there are none."""
        return self._pool.page_bytes(num_instances, recent=True) if self._format.recent else 0

    def num_held(self, length: int) -> int:
        """How many a sequence of so many positions holds between steps, at most."""
        return window_pages(self._format, length)

    def num_lacking(self, cache: KvCache, length: int, chunk_rows: int) -> int:
        """The pages that a step to this length has to take."""
        if not self._format.recent or length <= cache.length:
            return 0
        added = num_pages(length) - num_pages(cache.length)
        if length - cache.length > chunk_rows:  # in several chunks, which leave pages behind for each other
            added = min(added, num_pages(self._format.recent + chunk_rows) + 2)
        return added + (_shared_part(cache) is not None)

    def reserve_(self, cache: KvCache, length: int, chunk_rows: int, num_instances: int) -> None:
        """Take them; and copy a page that the next row writes, if anybody else holds it.

        Raises:
            MemoryError: the pool or the machine has too few.
        """
        lacking = self.num_lacking(cache, length, chunk_rows)
        if not lacking:  # most tokens: nothing to note
            return
        shared = _shared_part(cache)
        if shared is not None:
            held = cache.recent[shared]
            copy = HeldPage(self._pool.copy(held.page), held.num_bytes)
            cache.hold_(cache.pages, {**cache.recent, shared: copy})
            lacking -= 1
        size = self.page_bytes(num_instances)
        self._reserved[cache] = [HeldPage(self._pool.take(num_instances, recent=True), size) for _ in range(lacking)]

    def slide_(self, cache: KvCache, end: int) -> None:
        """Hold the pages that rows from the cache's end up to `end` read and write, and some to be cut back to."""
        needed, wanted = (cache.exact_pages(max(0, start), end) for start in (cache.length, cache.length - KEPT_BACK))
        spare = self._reserved.get(cache, [])
        kept = {index: held for index, held in cache.recent.items() if index in wanted}
        left = [held for index, held in cache.recent.items() if index not in wanted]
        spare += [held for held in left if not held.in_tree and len(held.caches) == 1]
        added = {index: spare.pop() for index in needed if index not in kept}
        if left or added:  # holding looks at all pages of the cache: not for every token
            cache.hold_(cache.pages, {**kept, **added})

    def release_(self, cache: KvCache) -> None:
        """The step is over: what it reserved and did not use goes back."""
        self._reserved.pop(cache, None)

    def attached(
        self,
        cache: KvCache,
        found: Sequence[tuple[Node, int]],
        length: int,
        copied: Callable[[HeldPage], HeldPage | None],
    ) -> Mapping[int, HeldPage] | None:
        """What a cache that takes over these nodes, up to a length, holds in float16; None if there is no memory."""
        recent = {}
        for index in cache.exact_pages(length, length):
            held = _of(cache, found, index)
            is_part = (index + 1) * PAGE_TOKENS > length
            mine = copied(held) if held is not None and is_part else held
            if mine is None:
                return None
            recent[index] = mine
        return recent


def continuable(cache: KvCache, found: Sequence[tuple[Node, int]]) -> Sequence[tuple[Node, int]]:
    """The longest part of these nodes, from the first on, after which the next token finds what it reads in float16.

    All of them, for a format without a recent window.
    """
    for number in range(len(found), 0, -1):
        end = (number - 1) * PAGE_TOKENS + found[number - 1][1]
        if all(_of(cache, found, index) is not None for index in cache.exact_pages(end, end)):
            return found[:number]
    return ()


def _of(cache: KvCache, found: Sequence[tuple[Node, int]], index: int) -> HeldPage | None:
    """A page in float16: the cache's own where it is full, else that of the node."""
    if (index + 1) * PAGE_TOKENS <= cache.length:
        return cache.recent.get(index)
    return found[index][0].recent if index < len(found) else None


def _shared_part(cache: KvCache) -> int | None:
    """The page in float16 that the next row writes and somebody else holds; None if there is none."""
    index = cache.length // PAGE_TOKENS
    held = cache.recent.get(index)
    if held is None or not cache.length % PAGE_TOKENS:
        return None
    return index if held.in_tree or len(held.caches) > 1 else None
