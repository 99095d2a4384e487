"""Runs sequences of tokens through one model for many callers, and computes only what is not in memory yet.

Two caches: "main" for conversations, "guidance" for the second pass of classifier-free guidance (made when first
asked for). Each call finds the longest prefix of its own sequence, in its cache or among those that the model shares,
so callers may take turns in any order. If the memory does not suffice for both caches, the other one is emptied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ropewalk.adapters.request import AdapterUse
from ropewalk.adapters.sets import AdapterKey
from ropewalk.base.errors import CacheFullError, RequestError
from ropewalk.faces.hf.history import TokenHistory
from ropewalk.faces.hf.reply_clock import ReplyClock
from ropewalk.generate.evaluate import LOGITS_BYTES
from ropewalk.generate.generate import Cancelled, GenerationStats, Progress
from ropewalk.model.cache import KvCache
from ropewalk.model.model import Model, checked_token_ids

MAIN, GUIDANCE = "main", "guidance"
IGNORED_LABEL = -100  # the convention of torch's cross entropy


@dataclass(slots=True)
class _Slot:
    """One cache; `holder` is the history whose tokens it begins with, computed with the adapters of `key`."""

    cache: KvCache
    holder: TokenHistory | None = None
    key: AdapterKey = ()


class Runner:
    """One model with its caches. Calls from several threads are run one after the other."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.adapters: tuple[AdapterUse, ...] = ()
        self.progress: Progress | None = None
        self.cancelled: Cancelled | None = None
        self._slots: dict[str, _Slot] = {}
        self._step = threading.Lock()
        self._replies = threading.RLock()
        self._replying = threading.local()
        self._clock: ReplyClock | None = None

    @property
    def last_stats(self) -> GenerationStats | None:
        """Tokens and times of the newest reply; None before its prompt has been read."""
        return None if self._clock is None else self._clock.stats

    @property
    def is_replying(self) -> bool:
        """True within a reply of this thread."""
        return getattr(self._replying, "depth", 0) > 0

    @contextmanager
    def reply(self) -> Iterator[None]:
        """Hold the model for one reply. Other threads wait: alternating would read each prompt again at every token."""
        with self._replies:
            self._replying.depth = getattr(self._replying, "depth", 0) + 1
            clock = self._clock = ReplyClock(self.model.max_seq_len)
            try:
                yield
            finally:
                clock.stop()
                self._replying.depth -= 1

    def extend(self, history: TokenHistory, token_ids: list[int], keep: int) -> torch.Tensor:
        """Append tokens to a history and give the logits after the last `keep` of them, [keep, V] float32.

        Raises:
            RequestError: as `Model.forward`. The history is then unchanged.
        """
        ids = checked_token_ids(token_ids, self.model.config.vocab_size)
        with self._step, torch.no_grad():
            started = time.perf_counter()
            slot = self._slot(history.slot)
            rest = self._rewind(slot, history, ids, keep)
            logits = self._run(slot, rest, keep)
            reused = len(history) + len(ids) - len(rest)
            history.extend_(ids)
            slot.holder, slot.key = history, self.model.adapter_key(self.adapters)
            if self.is_replying and history.slot == MAIN and self._clock is not None:
                self._clock.count(history, keep, reused, time.perf_counter() - started)
        return logits

    def loss(self, token_ids: list[int], labels: list[int]) -> torch.Tensor:
        """Mean of -log p(labels[i] | token_ids[:i]) over i >= 1, labels of -100 left out; NaN if none is left.

        Memory: logits in blocks of 64 MiB.

        Raises:
            RequestError: as `Model.forward`; a label that is not a token id.
        """
        ids = checked_token_ids(token_ids, self.model.config.vocab_size)
        targets = torch.tensor([*labels[1:], IGNORED_LABEL])
        scored = (targets != IGNORED_LABEL).nonzero()
        first = int(scored[0]) if len(scored) else len(ids) - 1
        out_of_range = [label for label in labels if label != IGNORED_LABEL and not 0 <= label < self.vocab_size]
        if out_of_range:
            raise RequestError(f"labels must be token ids or {IGNORED_LABEL}, got {out_of_range[0]}")
        with self._step, torch.no_grad():
            history, slot = TokenHistory(), self._slot(MAIN)
            rest = self._rewind(slot, history, ids, len(ids) - first)
            return self._mean_nll(slot, rest, targets[len(ids) - len(rest) :])

    def _mean_nll(self, slot: _Slot, ids: list[int], targets: torch.Tensor) -> torch.Tensor:
        model, start = self.model, slot.cache.length
        block = max(1, min(model.max_input_len, LOGITS_BYTES // (4 * self.vocab_size)))
        total, count = 0.0, 0
        for first in range(0, len(ids), block):
            wanted = targets[first : first + block]
            scored = wanted != IGNORED_LABEL
            mode = "all" if bool(scored.any()) else "none"
            logits = self._forward(slot, ids[first : first + block], mode, start + len(ids))  # [rows, V] or None
            if logits is not None:
                wanted, scored = wanted.to(logits.device), scored.to(logits.device)
                losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED_LABEL)
                total += float(losses[scored].double().sum())
                count += int(scored.sum())
        return torch.tensor(total / count if count else float("nan"))

    @property
    def vocab_size(self) -> int:
        """V, the size of the vocabulary."""
        return self.model.config.vocab_size

    def _slot(self, name: str) -> _Slot:
        slot = self._slots.get(name)
        if slot is None or not self.model.accepts(slot.cache):  # new, or the layer order was changed
            slot = self._slots[name] = _Slot(self.model.new_cache())
        return slot

    def _rewind(self, slot: _Slot, history: TokenHistory, ids: list[int], keep: int) -> list[int]:
        """Keep in the cache what can be reused; returns the tokens to run, which are at least the last `keep`.

        If the cache was last used by the same history, it begins with its tokens, and they need no comparison.
        """
        whole = len(history) + len(ids)
        if slot.holder is history and slot.key == self.model.adapter_key(self.adapters) and keep <= len(ids):
            slot.cache.truncate(len(history))
            return ids
        ids = history.token_ids + ids
        kept = self.model.reusable_prefix(slot.cache, ids, self.adapters)
        slot.holder = None  # until the rest has been run
        if kept < slot.cache.length:
            self.model.share(slot.cache)  # another sequence's: it may come back
        slot.cache.truncate(min(kept, whole - keep))
        if keep < whole:
            self.model.attach(slot.cache, ids[: whole - keep + 1], self.adapters, seq_len=whole)
        return ids[slot.cache.length :]

    def _run(self, slot: _Slot, ids: list[int], keep: int) -> torch.Tensor:
        """Run tokens on top of the cache; logits of the last `keep`."""
        end = slot.cache.length + len(ids)
        if keep == 1:
            return self._forward(slot, ids, "last", None)
        if keep < len(ids):
            self._forward(slot, ids[:-keep], "none", end)
        return self._forward(slot, ids[-keep:], "all", end)

    def _forward(self, slot: _Slot, ids: list[int], mode: str, seq_len: int | None) -> torch.Tensor:
        """`Model.forward`. If it does not complete, the slot loses its holder."""
        holder, slot.holder = slot.holder, None
        end = slot.cache.length + len(ids)
        watched = {"progress": self.progress, "cancelled": self.cancelled}
        try:
            logits = self.model.forward(ids, slot.cache, mode, seq_len=seq_len, adapters=self.adapters, **watched)
        except CacheFullError:
            if not self._empty_others(slot):
                raise
            logits = self.model.forward(ids, slot.cache, mode, seq_len=seq_len, adapters=self.adapters, **watched)
        if slot.cache.length < end:
            raise RequestError("cancelled: the function given as `cancelled` returned True while tokens were read")
        slot.holder = holder
        return logits

    def _empty_others(self, slot: _Slot) -> bool:
        """Give back the pages of the other caches; False if there are none. What they hold is kept as long as it can
        be."""
        others = [other for other in self._slots.values() if other is not slot and other.cache.length]
        for other in others:
            other.holder = None
            if self.model.accepts(other.cache):
                self.model.share(other.cache)
            other.cache.truncate(0)
        return bool(others)
