"""Several caches of one model, so that conversations which take turns each keep what they have computed.

A request gets, of the caches that are free, the one of which it can use the longest prefix, provided that it keeps at
least as many tokens as it throws away; else the one that was used the longest time ago. Without that condition a
beginning that all conversations share, be it the bos token alone, would let a new one overwrite a long one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ropewalk.adapters.request import Request
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.generate.generate import CacheLike, ModelLike


class EngineModel(ModelLike, Protocol):
    """What the engine needs of a model."""

    def new_cache(self, max_seq_len: int | None = None) -> CacheLike: ...
    def accepts(self, cache: CacheLike) -> bool: ...


class CachePool:
    """`num_caches` caches of the model's full context. Their memory is set aside now and used as they fill.

    Raises:
        ConfigError: not a positive number, or more than there is memory for.
    """

    def __init__(self, model: EngineModel, num_caches: int = 1) -> None:
        if not isinstance(num_caches, int) or isinstance(num_caches, bool) or num_caches < 1:
            raise ConfigError(f"num_caches must be a positive integer, got {num_caches!r}")
        self._model = model
        self._lock = threading.Lock()
        self._free: list[CacheLike] = [model.new_cache() for _ in range(num_caches)]  # the longest unused first
        self.capacity = self._free[0].capacity

    @contextmanager
    def lend(self, prompt_ids: Sequence[int], adapters: Request | None) -> Iterator[CacheLike]:
        """The best free cache for this prompt, for one request at a time.

        Raises:
            RequestError: none is free, because one ticket was used for two streams at once; unknown adapters.
        """
        with self._lock:
            if not self._free:
                raise RequestError("a ticket allows one stream at a time: exhaust or close() the first one")
            self._renew()
            cache = self._free.pop(self._best(prompt_ids, adapters))
        try:
            yield cache
        finally:
            with self._lock:
                self._free.append(cache)

    def _renew(self) -> None:
        """Make anew what the model does not accept any more, because its layer order was changed."""
        for index, cache in enumerate(self._free):
            if not self._model.accepts(cache):
                self._free[index] = self._model.new_cache(self.capacity)

    def _best(self, prompt_ids: Sequence[int], adapters: Request | None) -> int:
        best, longest = 0, 0
        for index, cache in enumerate(self._free):
            kept = self._model.reusable_prefix(cache, prompt_ids, adapters)
            if kept > longest and kept >= cache.length - kept:
                best, longest = index, kept
        return best
