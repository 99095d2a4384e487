"""Caches whose sequences have ended, kept for a prompt that goes on from them: until the memory is needed.

The prefix tree has what was computed and never moved since; it finds that for any prompt. Turned and shifted keys equal
no computed ones, so they are not in the tree: only the conversation that they belong to may go on with them, and only
its own client. A new prompt is that conversation's if it begins like a kept cache that was moved; or, where shifting is
asked for, like a kept cache with a stretch taken out (`shift.find_removed`), as a front end does when the oldest turns
have to go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.model.cache import HeldPage, KvCache
from ropewalk.model.shift import Removed, common, find_removed

MOST_KEPT = 16  # caches, the newest


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A kept cache that holds a beginning of a prompt once `removed` is taken out of it."""

    cache: KvCache
    removed: Removed

    @property
    def length(self) -> int:
        """Tokens of the prompt that it then holds."""
        return self.removed.keep + self.removed.rest


class KeptCaches:
    """The caches and their clients, oldest first. Its methods are called under the lock of the store."""

    def __init__(self) -> None:
        self._kept: deque[tuple[KvCache, Hashable]] = deque()

    def __iter__(self) -> Iterator[KvCache]:
        return (cache for cache, _ in self._kept)

    @property
    def idle_bytes(self) -> int:
        """Memory of the pages that no cache in use holds, besides those that the tree counts."""
        mine = set(self)
        pages: set[HeldPage] = set()
        for cache in mine:
            pages.update((*cache.pages, *cache.recent.values()))
        return sum(held.num_bytes for held in pages if mine.issuperset(held.caches))

    def add(self, cache: KvCache, client: Hashable) -> None:
        """Keep a cache; one that only has a beginning of it goes, and the oldest where there are too many."""
        ids = cache.token_ids
        for other in [other for other, theirs in self._kept if theirs == client]:
            if other.length <= len(ids) and common(ids, other.token_ids) == other.length:
                self.forget(other)
        self._kept.append((cache, client))
        if len(self._kept) > MOST_KEPT:
            self.drop_oldest()

    def forget(self, cache: KvCache) -> None:
        """Keep it no longer; it stays as it is."""
        self._kept = deque(pair for pair in self._kept if pair[0] is not cache)

    def drop_oldest(self) -> bool:
        """Give back the pages of the oldest; False if there is none."""
        if not self._kept:
            return False
        cache, _ = self._kept.popleft()
        cache.truncate(0)
        return True

    def find(self, token_ids: Sequence[int], client: Hashable, shifts: bool, more_than: int) -> list[Found]:
        """Those that hold more than so many of these tokens, or would if a stretch were taken out; the best first.

        What holds no page more is not worth the move.
        """
        found = []
        for cache, theirs in self._kept:
            if theirs != client:
                continue
            if not (shifts or cache.was_moved):
                continue
            ids = cache.token_ids
            if cache.was_moved:
                found.append(Found(cache, Removed(common(token_ids, ids), 0, 0)))
            removed = find_removed(token_ids, ids) if shifts else None
            if removed is not None and removed.keep and removed.rest >= PAGE_TOKENS:
                found.append(Found(cache, removed))
        worth = [each for each in found if each.length >= more_than + PAGE_TOKENS]
        return sorted(worth, key=lambda each: (-each.length, each.removed.drop))
