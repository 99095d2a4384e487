"""The key/value cache of one sequence: which tokens it holds, in which pages, and how they were computed.

The backend owns the layout of a page; this module counts positions. It also remembers, segment by segment, the origin
of keys and values: the adapters in use, the frequencies that rotate its keys, and what has been done to them since they
were computed. At any moment all keys of a cache are rotated by the same frequencies: where these change (a RoPE method
that depends on the length, another RoPE), the keys are turned or computed anew (model/rescale.py). The segments of a
cache can differ in the rest; a prefix is reused only up to the first one whose origin is not that of the new call.

Several caches and the prefix tree may hold the same page. A page that anybody else holds is never written: the cache
that has to append to it takes a copy first (model/store.py).

A format with a recent window has pages in float16 besides, of the last positions only: a cache cannot be cut back so
far that those are gone which the next token must read (`KvCache.continuable`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from ropewalk.backends.protocol import PAGE_TOKENS, Page
from ropewalk.base.errors import RequestError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.config.layer_order import LayerOrder

KEPT_BACK = PAGE_TOKENS  # positions by which a cache with a recent window can be cut back in any case: wrong guesses


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Inverse frequencies (float64 bytes) and attention scale: equal exactly when the rotation tables are equal."""

    inverse_frequencies: bytes
    attention_scale: float


@dataclass(frozen=True, slots=True)
class Turned:
    """Keys that were rotated by other frequencies, `before`, were turned by the difference of the angles."""

    before: Frequencies


@dataclass(frozen=True, slots=True)
class Shifted:
    """Keys and values were moved down by the tokens `dropped` (int32 bytes), which stood from position `start` on."""

    start: int
    dropped: bytes


@dataclass(frozen=True, slots=True)
class Origin:
    """Equal exactly when equal tokens give equal keys and values, if that holds for all positions before, too.

    frequencies: those that rotate the keys now. adapters: (number of the loaded adapter, weight, instances or None for
    all) of each, in the order of the numbers. moves: what was done to the keys since they were computed, in order; keys
    that were moved equal no computed ones.
    """

    frequencies: Frequencies
    adapters: tuple[tuple[int, float, tuple[int, ...] | None], ...] = ()
    moves: tuple[Turned | Shifted, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions from `start` up to the next segment. seq_len: the length that they were computed for."""

    start: int
    origin: Origin
    seq_len: int


class CacheOwner(Protocol):
    """What a cache needs of the model that made it."""

    def save_cache(
        self,
        cache: KvCache,
        path: str | Path,
        progress: Callable[[int, int], None] | None = None,
        about: Mapping[str, str] | None = None,
    ) -> int: ...


class HeldPage:
    """A page of the pool, of either kind, and who holds it. num_bytes: its memory. in_tree: the tree holds it."""

    __slots__ = ("caches", "in_tree", "num_bytes", "page")

    def __init__(self, page: Page, num_bytes: int) -> None:
        self.page = page
        self.num_bytes = num_bytes
        self.in_tree = False
        self.caches: weakref.WeakSet[KvCache] = weakref.WeakSet()


def num_pages(length: int) -> int:
    """The pages that `length` positions take."""
    return -(-length // PAGE_TOKENS)


class KvCache:
    """Keys and values of one sequence, of all layer instances. Made by `Model.new_cache`, filled by `Model.step`."""

    def __init__(
        self,
        owner: CacheOwner,
        lock: threading.RLock,
        cache_format: CacheFormat,
        capacity: int,
        layer_order: LayerOrder | None = None,
    ) -> None:
        self._owner = weakref.ref(owner)  # a model keeps caches of conversations that may go on, and is to go at once
        self.cache_format = cache_format
        self.layer_order = layer_order  # its pages have keys and values for each of the order's instances
        self.capacity = capacity
        self.rope: object = None  # of the model, when its keys were rotated; of no meaning while it is empty
        self.pages: tuple[HeldPage, ...] = ()
        self.recent: Mapping[int, HeldPage] = MappingProxyType({})  # pages in float16, by their place among the pages
        self._lock = lock  # of the store that the pages come from
        self._token_ids: list[int] = []
        self._segments: list[Segment] = []
        self._reach = self._turned_at = 0

    @property
    def owner(self) -> CacheOwner | None:
        """The model that made it; None once nobody else holds that."""
        return self._owner()

    @property
    def length(self) -> int:
        """The number of cached positions."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> list[int]:
        """A copy of the ids of the cached tokens."""
        return list(self._token_ids)

    @property
    def num_bytes(self) -> int:
        """Memory of the pages that it holds; others may hold the same."""
        return sum(held.num_bytes for held in (*self.pages, *self.recent.values()))

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(start, end, seq_len) of each stretch: rows start..end were computed for sequences of that length.

        Appending the same tokens with the same seq_len and adapters, segment by segment, gives the same bits, unless
        the cache was shifted, given another RoPE, or truncated where its keys had been turned (see `is_ahead`).
        """
        return [(start, end, segment.seq_len) for start, end, segment in self.stretches]

    @property
    def stretches(self) -> list[tuple[int, int, Segment]]:
        """(start, end, segment): how each stretch of positions came about."""
        starts = [segment.start for segment in self._segments]
        ends = [*starts[1:], self.length][: len(starts)]
        return list(zip(starts, ends, self._segments, strict=True))

    @property
    def frequencies(self) -> Frequencies | None:
        """Those that all its keys are rotated by; None if it is empty."""
        return self._segments[-1].origin.frequencies if self._segments else None

    @property
    def reach(self) -> int:
        """The length that its frequencies are for; 0 if it is empty."""
        return self._reach

    @property
    def turned_at(self) -> int:
        """How long it was when its keys were last turned because it had outgrown their frequencies; 0 if never."""
        return self._turned_at

    @property
    def is_ahead(self) -> bool:
        """True if it was truncated after its keys had been turned for the length that it had then."""
        return self.length < self._turned_at

    @property
    def was_moved(self) -> bool:
        """True if some of its keys were turned or shifted since they were computed."""
        return any(segment.origin.moves for segment in self._segments)

    @property
    def whole_segments(self) -> tuple[Segment, ...]:
        """How its positions were computed, stretch by stretch."""
        return tuple(self._segments)

    def save(
        self,
        path: str | Path,
        progress: Callable[[int, int], None] | None = None,
        about: Mapping[str, str] | None = None,
    ) -> int:
        """Write it to a file, for `Model.load_cache`; returns the size of the file. Errors as for `Model.save_cache`.

        Raises:
            RequestError: its model is gone.
        """
        model = self.owner
        if model is None:
            raise RequestError("the cache cannot be saved: its model is gone; keep the model for as long as its caches")
        return model.save_cache(self, path, progress, about)

    def fork(self) -> KvCache:
        """Another cache with the same positions. It holds the same pages: whoever writes to one takes a copy first.
        `copy.copy` gives the same.

        Raises:
            RequestError: its model is gone.
        """
        model = self.owner
        if model is None:
            raise RequestError(
                "the cache cannot be forked: its model is gone; keep the model for as long as its caches"
            )
        with self._lock:
            made = KvCache(model, self._lock, self.cache_format, self.capacity, self.layer_order)
            made.hold_(self.pages, self.recent)
            made.rope = self.rope
            made.restore_(self._token_ids, self._segments, self._reach, self._turned_at)
        return made

    __copy__ = fork

    def restore_(self, token_ids: Sequence[int], segments: Sequence[Segment], reach: int, turned_at: int) -> None:
        """Count positions whose keys and values are in the pages that it holds, in place of those before.

        reach, turned_at: as they were when these positions were saved.
        """
        self._token_ids, self._segments = list(token_ids), list(segments)
        self._reach, self._turned_at = reach, turned_at

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on, and give back their pages.

        Raises:
            RequestError: the cache does not hold that many positions; or its format has a recent window, and the
                positions before `length` are not held in float16 any more (see `continuable`).
        """
        if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= self.length:
            raise RequestError(f"cannot truncate to {length!r}: the cache holds {self.length} positions (0 empties it)")
        if self.continuable(length) < length:
            raise RequestError(
                f"cannot truncate to {length}: a {self.cache_format} cache of {self.length} positions holds those from "
                f"{min(self.recent, default=0) * PAGE_TOKENS} on in float16, and the next token would have to read the "
                f"{self.cache_format.recent} before it so; truncate to 0 and compute the tokens again"
            )
        del self._token_ids[length:]
        self._segments = [segment for segment in self._segments if segment.start < length]
        if not length:
            self._reach = self._turned_at = 0
        self.give_back_()

    def continuable(self, length: int) -> int:
        """The most positions, up to `length`, to which it can be truncated: all of them, or none.

        None only for a format with a recent window, if `length` is more than a page before the end: then what the next
        token must read in float16 may be gone.
        """
        needed = self.exact_pages(length, length)
        return length if all(index in self.recent for index in needed) else 0

    def exact_pages(self, start: int, end: int) -> range:
        """The pages up to position `end` that tokens from position `start` on read in float16."""
        if not self.cache_format.recent:
            return range(0)
        return range(self.cache_format.first_exact_page(start), num_pages(end))

    def give_back_(self) -> None:
        """Let go of the pages beyond the last position, and of those in float16 that no token to come reads."""
        kept = num_pages(self.length)
        recent = self.exact_pages(max(0, self.length - KEPT_BACK), self.length)
        if kept < len(self.pages) or any(index not in recent for index in self.recent):
            self.hold_(self.pages[:kept], {index: held for index, held in self.recent.items() if index in recent})

    def hold_(self, pages: Sequence[HeldPage], recent: Mapping[int, HeldPage] | None = None) -> None:
        """Hold exactly these pages from now on. recent: those in float16 (default: the same as before)."""
        recent = self.recent if recent is None else recent
        with self._lock:
            held_now = {*pages, *recent.values()}
            for held in {*self.pages, *self.recent.values()} - held_now:
                held.caches.discard(self)
            for held in held_now:
                held.caches.add(self)
            self.pages, self.recent = tuple(pages), MappingProxyType(dict(recent))

    def record_(self, token_ids: Sequence[int], origin: Origin, seq_len: int) -> None:
        """Count positions whose keys and values have just been written to the pages.

        seq_len: the length that the frequencies of `origin` are for; at least that of the cache from now on.
        """
        last = self._segments[-1] if self._segments else None
        if last is None or last.origin != origin:
            self._segments.append(Segment(self.length, origin, seq_len))
        elif last.seq_len < seq_len:
            self._segments[-1] = Segment(last.start, origin, seq_len)
        self._reach = max(self._reach, seq_len)
        self._token_ids.extend(token_ids)

    def record_turn_(self, frequencies: Frequencies, reach: int, grows: bool) -> None:
        """Count all keys as turned to these frequencies, which are for a length of `reach`.

        grows: because the cache outgrows the length that its frequencies were for.
        """
        moves = [Turned(segment.origin.frequencies) for segment in self._segments]
        self._segments = [_moved(each, frequencies, move) for each, move in zip(self._segments, moves, strict=True)]
        self._reach = reach
        self._turned_at = self.length if grows else 0

    def set_reach_(self, reach: int) -> None:
        """Count the frequencies of its keys as those for another length, which has the same."""
        self._reach, self._turned_at = reach, 0

    def become_(self, other: KvCache) -> None:
        """Take over all that another cache holds, and leave that one empty."""
        self.hold_(other.pages, other.recent)
        self.rope = other.rope
        self._token_ids, self._segments = other._token_ids, other._segments
        self._reach, self._turned_at = other._reach, other._turned_at
        other._token_ids, other._segments = [], []
        other.truncate(0)

    def record_shift_(self, keep: int, drop: int) -> None:
        """Count the positions from keep + drop on as moved down by `drop`, over those that were there."""
        dropped = np.asarray(self._token_ids[keep : keep + drop], dtype=np.int32).tobytes()
        kept, moved = [], []
        for start, end, segment in self.stretches:
            if start < keep:
                kept.append(segment)
            if end > keep + drop:
                first = Segment(max(start - drop, keep), segment.origin, segment.seq_len)
                moved.append(_moved(first, segment.origin.frequencies, Shifted(keep, dropped)))
        self._segments = kept + moved
        self._turned_at = 0
        del self._token_ids[keep : keep + drop]

    def common_prefix(self, token_ids: Sequence[int], origin: Origin) -> int:
        """How many leading positions hold exactly these tokens, computed in exactly this way."""
        limit = min(self.same_origin(origin), len(token_ids))
        return common_length(self._token_ids[:limit], token_ids[:limit])

    def same_origin(self, origin: Origin) -> int:
        """How many leading positions were computed in exactly this way, whatever their tokens."""
        return next((segment.start for segment in self._segments if segment.origin != origin), self.length)

    @property
    def first_segment(self) -> Segment | None:
        """How its first position was computed; None if it is empty."""
        return self._segments[0] if self._segments else None


def _moved(segment: Segment, frequencies: Frequencies, move: Turned | Shifted) -> Segment:
    origin = segment.origin
    return Segment(segment.start, Origin(frequencies, origin.adapters, (*origin.moves, move)), segment.seq_len)


def common_length(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many leading elements are equal."""
    limit = min(len(ours), len(theirs))
    if ours[:limit] == theirs[:limit]:
        return limit
    pairs = zip(ours, theirs, strict=False)
    return next((position for position, (one, other) in enumerate(pairs) if one != other), limit)
