"""The key/value cache of one sequence: which tokens it holds, in which pages, and how they were computed.

The backend owns the layout of a page; this module counts positions. It also remembers, segment by segment, the origin
of keys and values: the adapters in use, and the frequencies that rotated the keys (RoPE methods that depend on the
length, dynamic NTK and longrope, choose them by the length that the whole call reaches). The segments of a cache can
differ; a prefix is reused only up to the first one whose origin is not that of the new call.

Several caches and the prefix tree may hold the same page. A page that anybody else holds is never written: the cache
that has to append to it takes a copy first (model/store.py).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.backends.protocol import PAGE_TOKENS, Page
from ropewalk.base.errors import RequestError
from ropewalk.config.layer_order import LayerOrder


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Inverse frequencies (float64 bytes) and attention scale: equal exactly when the rotation tables are equal."""

    inverse_frequencies: bytes
    attention_scale: float


@dataclass(frozen=True, slots=True)
class Origin:
    """Equal exactly when equal tokens give equal keys and values.

    adapters: (number of the loaded adapter, weight, instances or None for all) of each, in the order of the numbers.
    """

    frequencies: Frequencies
    adapters: tuple[tuple[int, float, tuple[int, ...] | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions from `start` up to the next segment. seq_len: a length that the frequencies of the origin are for."""

    start: int
    origin: Origin
    seq_len: int


class HeldPage:
    """A page of the pool and who holds it. num_bytes: its memory. in_tree: the prefix tree holds it."""

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
        self, owner: object, lock: threading.RLock, capacity: int, layer_order: LayerOrder | None = None
    ) -> None:
        self.owner = owner
        self.layer_order = layer_order  # its pages have keys and values for each of the order's instances
        self.capacity = capacity
        self.pages: tuple[HeldPage, ...] = ()
        self._lock = lock  # of the store that the pages come from
        self._token_ids: list[int] = []
        self._segments: list[Segment] = []

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
        return sum(held.num_bytes for held in self.pages)

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(start, end, seq_len) of each stretch: rows start..end were computed for sequences of that length.

        Appending the same tokens with the same seq_len and adapters, segment by segment, gives the same bits.
        """
        starts = [segment.start for segment in self._segments]
        ends = [*starts[1:], self.length][: len(starts)]
        return [(segment.start, end, segment.seq_len) for segment, end in zip(self._segments, ends, strict=True)]

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on, and give back their pages.

        Raises:
            RequestError: the cache does not hold that many positions.
        """
        if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= self.length:
            raise RequestError(f"cannot truncate to {length!r}: the cache holds {self.length} positions (0 empties it)")
        del self._token_ids[length:]
        self._segments = [segment for segment in self._segments if segment.start < length]
        self.give_back_()

    def give_back_(self) -> None:
        """Let go of the pages beyond the last position."""
        kept = num_pages(self.length)
        if kept < len(self.pages):
            self.hold_(self.pages[:kept])

    def hold_(self, pages: Sequence[HeldPage]) -> None:
        """Hold exactly these pages from now on."""
        with self._lock:
            for held in set(self.pages).difference(pages):
                held.caches.discard(self)
            for held in pages:
                held.caches.add(self)
            self.pages = tuple(pages)

    def record_(self, token_ids: Sequence[int], origin: Origin, seq_len: int) -> None:
        """Count positions whose keys and values have just been written to the pages.

        seq_len: the length that the frequencies of `origin` are for; at least that of the cache from now on.
        """
        last = self._segments[-1] if self._segments else None
        if last is None or last.origin != origin:
            self._segments.append(Segment(self.length, origin, seq_len))
        elif last.seq_len < seq_len:
            self._segments[-1] = Segment(last.start, origin, seq_len)
        self._token_ids.extend(token_ids)

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


def common_length(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many leading elements are equal."""
    limit = min(len(ours), len(theirs))
    if ours[:limit] == theirs[:limit]:
        return limit
    pairs = zip(ours, theirs, strict=False)
    return next((position for position, (one, other) in enumerate(pairs) if one != other), limit)
