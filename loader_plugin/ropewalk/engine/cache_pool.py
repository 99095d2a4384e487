"""Several caches of one model, so that conversations that alternate each keep what they have computed.

A request gets the free cache that shares the longest prefix with its prompt, provided that this keeps at least as many
tokens as it throws away; otherwise the least recently used one. Without that condition, a beginning that all
conversations share, be it the bos token alone, would let a new conversation overwrite a long one.
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
    """`num_caches` caches, each for the model's full context. Their memory is reserved now and used as they fill.

    Raises:
        ConfigError: `num_caches` is not a positive integer, or there is not enough memory.
    """

    def __init__(self, model: EngineModel, num_caches: int = 1) -> None:
        if not isinstance(num_caches, int) or isinstance(num_caches, bool) or num_caches < 1:
            raise ConfigError(f"num_caches must be a positive integer, got {num_caches!r}")
        self._model = model
        self._lock = threading.Lock()
        self._free: list[CacheLike] = [model.new_cache() for _ in range(num_caches)]  # least recently used first
        self.capacity = self._free[0].capacity

    @contextmanager
    def lend(self, prompt_ids: Sequence[int], adapters: Request | None) -> Iterator[CacheLike]:
        """Lend the best free cache for this prompt to one request.

        Raises:
            RequestError: no cache is free, because one ticket was used for two streams at once; unknown adapters.
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
        """Replace the caches that the model no longer accepts because its layer order has changed."""
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
