"""A model whose logits are a fixed function of the tokens so far: what generation and the engine need, and no more."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch


class FakeCache:
    """Token ids instead of keys and values."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.token_ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.token_ids[length:]


class FakeModel:
    """Logits of a prefix are random numbers seeded by it, or what `script` maps its length to: one token for sure.

    calls: the token ids handed to each `forward`.
    """

    def __init__(
        self,
        vocab_size: int = 64,
        capacity: int = 128,
        eos: tuple[int, ...] = (),
        script: Callable[[list[int]], int | None] | None = None,
    ) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size, eos_token_ids=eos)
        self.capacity, self.script = capacity, script
        self.calls: list[list[int]] = []

    def new_cache(self, max_seq_len: int | None = None) -> FakeCache:
        return FakeCache(max_seq_len or self.capacity)

    def accepts(self, cache: FakeCache) -> bool:
        return True

    def reusable_prefix(self, cache: FakeCache, token_ids: Sequence[int], adapters=None) -> int:
        pairs = enumerate(zip(cache.token_ids, list(token_ids)[:-1], strict=False))
        limit = min(cache.length, len(token_ids) - 1)
        return next((position for position, (a, b) in pairs if a != b), limit)

    def forward(self, token_ids, cache, logits="last", progress=None, cancelled=None, seq_len=None, adapters=None):
        self.calls.append(list(token_ids))
        for done, token_id in enumerate(token_ids, 1):
            if cancelled is not None and cancelled():
                return None
            cache.token_ids.append(int(token_id))
            if progress is not None:
                progress(done, len(token_ids))
        assert cache.length <= cache.capacity
        return None if logits == "none" else self.logits(cache.token_ids)[None]

    def logits(self, history: Sequence[int]) -> torch.Tensor:
        """[V] float32."""
        rng = np.random.default_rng(zlib.crc32(np.asarray(history, dtype=np.int64).tobytes()))
        values = rng.normal(size=self.config.vocab_size).astype(np.float32)
        chosen = self.script(list(history)) if self.script is not None else None
        if chosen is not None:
            values[chosen] = 100.0
        return torch.from_numpy(values)


def reply(text_ids: Sequence[int], prompt_length: int) -> Callable[[list[int]], int | None]:
    """A script that answers a prompt of that length with these tokens."""
    return lambda history: dict(enumerate(text_ids, prompt_length)).get(len(history))
