"""A model whose logits are a fixed function of the tokens so far: what generation and the engine need, and no more.

Its pages are as real as its caches: shared, counted, evicted and missing, with the rules of the real ones.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from ropewalk.base.errors import CacheFullError, RequestError
from ropewalk.model.step import Span
from ropewalk.model.work import TokenWork

PAGE = 64  # tokens
Position = tuple[int, object]  # (token id, how it was computed)


class FakeCache:
    """Token ids instead of keys and values, with how each of them was computed."""

    def __init__(self, model: FakeModel, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.positions: list[Position] = []
        self.pages: list[object] = []
        self._segments: list[tuple[int, int, int]] = []
        self._reach = self._turned_at = 0
        model.caches.append(weakref.ref(self))

    @property
    def length(self) -> int:
        return len(self.positions)

    @property
    def reach(self) -> int:
        return self._reach if self.positions else 0

    @property
    def is_ahead(self) -> bool:
        return self.length < self._turned_at

    @property
    def was_moved(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        return PAGE * len(self.pages)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for token_id, _ in self.positions]

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        return list(self._segments)

    def continuable(self, length: int) -> int:
        kept_back = self.model.kept_back
        return length if kept_back is None or self.length - length <= kept_back else 0

    def truncate(self, length: int) -> None:
        with self.model.alone():
            assert self.continuable(length) == length
            assert 0 <= length <= self.length
            del self.positions[length:]
            del self.pages[-(-length // PAGE) :]
            self._segments = [(a, min(b, length), n) for a, b, n in self._segments if a < length]
            if not length:
                self._reach = self._turned_at = 0

    def add_(self, token_ids: Sequence[int], seq_len: int, how: object) -> None:
        if not token_ids:
            return
        self._segments.append((self.length, self.length + len(token_ids), seq_len))
        self.positions += [(int(token_id), how) for token_id in token_ids]
        self._reach = max(self._reach, seq_len)

    def turn_(self, reach: int) -> None:
        """All keys follow the length; what they have become tells how."""
        before, after = self.model.frequencies(self.reach), self.model.frequencies(reach)
        if self.positions and before != after:
            self.positions = [(token_id, ("turned", how, after)) for token_id, how in self.positions]
            self.pages = [object() for _ in self.pages]
            self._turned_at = self.length
        self._reach = max(self._reach, reach)


class FakeModel:
    """Logits of a prefix are random numbers seeded by it, or what `script` maps its length to: one token for sure.

    calls: the token ids of each span. num_pages: of the pool (None: any number). turns_at: keys of sequences longer
    than this are rotated by their length, and the logits tell. kept_back: how far caches can be cut back (None: all).
    """

    def __init__(
        self,
        vocab_size: int = 64,
        capacity: int = 128,
        eos: tuple[int, ...] = (),
        script: Callable[[list[int]], int | None] | None = None,
        num_pages: int | None = None,
        turns_at: int | None = None,
        max_input_len: int = 2048,
        kept_back: int | None = None,
    ) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size, eos_token_ids=eos, source="fake")
        self.max_seq_len = self.capacity = capacity
        self.max_input_len, self.num_pages, self.turns_at, self.script = max_input_len, num_pages, turns_at, script
        self.kept_back = kept_back
        self.work = TokenWork(weights=2, key=0, windows=())
        self.adapters: tuple[str, ...] = ()
        self.rope_growth = "rotate"
        self.calls: list[list[int]] = []
        self.steps: list[list[Span]] = []
        self.caches: list[weakref.ref[FakeCache]] = []
        self.tree: dict[tuple[Position, ...], object] = {}  # what pages hold -> page, least recently used first
        self._inside: int | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A model is not for two threads at once: this notices them."""
        me, before = threading.get_ident(), self._inside
        assert before in (None, me), "two threads are in the model"
        self._inside = me
        try:
            yield
        finally:
            self._inside = before

    def new_cache(self, max_seq_len: int | None = None) -> FakeCache:
        return FakeCache(self, max_seq_len or self.capacity)

    def adapter_key(self, adapters) -> object:
        return repr(adapters or ())

    def cache_bytes(self, length: int) -> int:
        return length

    @property
    def cache_memory(self) -> int:
        return PAGE * (self.num_pages or 10**6)

    @property
    def cache_used(self) -> int:
        return PAGE * len(self._used())

    @property
    def cache_shared(self) -> int:
        return PAGE * len(self._evictable())

    def accepts(self, cache: FakeCache) -> bool:
        return cache.model is self

    def share(self, cache: FakeCache) -> None:
        with self.alone():
            ends = [*range(PAGE, cache.length + 1, PAGE), *([cache.length] if cache.length % PAGE else [])]
            for end in ends:
                key = tuple(cache.positions[:end])
                if key in self.tree:
                    self.tree[key] = self.tree.pop(key)
                elif not end % PAGE:
                    self.tree[key] = cache.pages[end // PAGE - 1]
                elif self._has_room(1):
                    self.tree[key] = object()

    def attach(self, cache: FakeCache, token_ids, adapters=None, seq_len=None) -> int:
        with self.alone():
            how = self._how(adapters, max(len(token_ids), seq_len or 0))
            wanted = tuple((int(token_id), how) for token_id in token_ids[:-1])
            assert [token_id for token_id, _ in cache.positions] == list(token_ids[: cache.length])
            if tuple(cache.positions) != wanted[: cache.length]:
                return cache.length
            found = max((_common(key, wanted) for key in self.tree), default=0)
            pages = cache.pages[: cache.length // PAGE]
            for number in range(len(pages), found // PAGE):
                key = wanted[: (number + 1) * PAGE]
                if key not in self.tree:  # a longer part of a page matches than the full pages before it
                    found = number * PAGE
                    break
                self.tree[key] = self.tree.pop(key)
                pages.append(self.tree[key])
            if found > cache.length:
                cache.pages = pages
                if found % PAGE and not self._has_room(1):
                    found = found // PAGE * PAGE
                elif found % PAGE:
                    pages.append(object())
                added = list(token_ids[cache.length : found])
                cache.add_(added, max(len(token_ids), seq_len or 0), how)
            return cache.length

    steps_under_way = 1

    def missing_bytes(self, spans: Sequence[Span]) -> int:
        wanted = sum(_pages_after(span) - len(span.cache.pages) for span in spans)
        if self.num_pages is None:
            return 0
        return PAGE * max(wanted - (self.num_pages - len(self._used())) - len(self._evictable()), 0)

    def forward(self, token_ids, cache, logits="last", progress=None, cancelled=None, seq_len=None, adapters=None):
        results = self.step([Span(token_ids, cache, logits, adapters, seq_len)], progress, cancelled)
        return None if results is None else results[0]

    def step(self, spans: Sequence[Span], progress=None, cancelled=None) -> list[torch.Tensor | None] | None:
        with self.alone():
            self._check(spans)
            self.steps.append(list(spans))
            try:
                return self._computed(spans, progress, cancelled)
            finally:
                for span in spans:
                    del span.cache.pages[-(-span.cache.length // PAGE) :]

    def _computed(self, spans: Sequence[Span], progress, cancelled) -> list[torch.Tensor | None] | None:
        results, done = [], 0
        for span in spans:
            self.calls.append(list(span.token_ids))
            end = self.reach_of(span.cache.reach, max(span.cache.length + len(span.token_ids), span.seq_len or 0))
            if span.cache.positions:
                span.cache.turn_(end)
            rows = []
            for token_id in span.token_ids:
                if cancelled is not None and cancelled():
                    return None
                span.cache.add_([token_id], end, self._how(span.adapters, end))
                if span.logits == "all":
                    rows.append(self.logits_of(span.cache.positions))
                done += 1
                if progress is not None:
                    progress(done, sum(len(other.token_ids) for other in spans))
            if span.logits == "last":
                rows = [self.logits_of(span.cache.positions)]
            results.append(torch.stack(rows) if rows else None)
        return results

    def logits_of(self, positions: Sequence[Position]) -> torch.Tensor:
        """[V] float32."""
        history = [token_id for token_id, _ in positions]
        extra = [repr(how) for _, how in positions if how is not None]
        return self.logits(history, "".join(extra))

    def logits(self, history: Sequence[int], extra: str = "") -> torch.Tensor:
        """[V] float32."""
        rng = np.random.default_rng(zlib.crc32(np.asarray(history, dtype=np.int64).tobytes() + extra.encode()))
        values = rng.normal(size=self.config.vocab_size).astype(np.float32)
        chosen = self.script(list(history)) if self.script is not None else None
        if chosen is not None:
            values[chosen] = 100.0
        return torch.from_numpy(values)

    def reach_of(self, reach: int, length: int) -> int:
        """As the model's, with steps of 16 tokens."""
        if self.turns_at is None or not reach:
            return length
        return reach if length <= reach else max(self.turns_at, -(-length // 16) * 16)

    def keep(self, cache: FakeCache, client=None) -> None:
        cache.truncate(0)

    def resume(self, cache, token_ids, adapters=None, client=None, shifts=False) -> int:
        return 0

    def frequencies(self, seq_len: int) -> int:
        return seq_len if self.turns_at is not None and seq_len > self.turns_at else 0

    def _how(self, adapters, seq_len: int) -> object:
        """None for a plain position, else what sets it apart."""
        frequencies = self.frequencies(seq_len)
        return (repr(adapters), frequencies) if adapters or frequencies else None

    def _check(self, spans: Sequence[Span]) -> None:
        assert spans
        assert len({id(span.cache) for span in spans}) == len(spans), "the same cache twice"
        for span in spans:
            if span.cache.length + len(span.token_ids) > span.cache.capacity:
                raise RequestError("more than the context")
        needed = sum(_pages_after(span) - len(span.cache.pages) for span in spans)
        if not self._has_room(needed):
            raise CacheFullError(f"{needed} pages are missing")
        for span in spans:
            span.cache.pages += [object() for _ in range(_pages_after(span) - len(span.cache.pages))]

    def _has_room(self, needed: int) -> bool:
        """Evict what nobody uses until so many pages are free."""
        while self.num_pages is not None and self.num_pages - len(self._used()) < needed:
            evictable = self._evictable()
            leaves = [key for key in self.tree if self._is_leaf(key)] if evictable else []
            leaf = min(leaves, key=lambda key: self.tree[key] not in evictable, default=None)
            if leaf is None:
                return False
            del self.tree[leaf]
        return True

    def _is_leaf(self, key: tuple[Position, ...]) -> bool:
        return not any(len(other) > len(key) and other[: len(key)] == key for other in self.tree)

    def _used(self) -> set[object]:
        return self._held() | set(self.tree.values())

    def _evictable(self) -> set[object]:
        return set(self.tree.values()) - self._held()

    def _held(self) -> set[object]:
        caches = [cache for made in list(self.caches) if (cache := made()) is not None]
        return {page for cache in caches for page in cache.pages}


def _pages_after(span: Span) -> int:
    return -(-(span.cache.length + len(span.token_ids)) // PAGE)


def _common(key: Sequence[Position], wanted: Sequence[Position]) -> int:
    pairs = enumerate(zip(key, wanted, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(key), len(wanted)))


def reply(text_ids: Sequence[int], prompt_length: int) -> Callable[[list[int]], int | None]:
    """A script that answers a prompt of that length with these tokens."""
    return lambda history: dict(enumerate(text_ids, prompt_length)).get(len(history))
