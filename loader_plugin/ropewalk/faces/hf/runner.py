"""Runs sequences of tokens through one model for many callers: each history is a sequence of the scheduler.

    history, new tokens -> its sequence (opened when first asked for) -> shared steps -> logits of the last rows

Replies in several threads share their steps, and begin with what others have computed. A history is only tokens: if
its sequence cannot go on (other adapters, another layer order), another one is opened for the same tokens.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ropewalk.adapters.request import AdapterUse
from ropewalk.base.errors import RequestError
from ropewalk.engine.speculation import Speculation
from ropewalk.faces.hf.foresight import Foresight
from ropewalk.faces.hf.history import TokenHistory
from ropewalk.faces.hf.open_history import OpenHistory
from ropewalk.faces.hf.reply_clock import ReplyClock
from ropewalk.generate.evaluate import LOGITS_BYTES
from ropewalk.generate.generate import Cancelled, GenerationStats, Progress
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Sequence
from ropewalk.generate.scheduler.timing import PATIENCE
from ropewalk.model.model import Model, checked_token_ids

MAIN, GUIDANCE = "main", "guidance"
IGNORED_LABEL = -100  # the convention of torch's cross entropy


class Runner:
    """One model for callers in any threads. speculation: who guesses ahead in replies, if anybody. shifts: what was
    computed of older prompts is moved down for prompts that lack a stretch of them."""

    def __init__(self, model: Model, speculation: Speculation | None = None, shifts: bool = False) -> None:
        self.model = model
        self.adapters: tuple[AdapterUse, ...] = ()
        self.progress: Progress | None = None
        self.cancelled: Cancelled | None = None
        self._speculation, self._shifts = speculation, shifts
        self._scheduler = Scheduler(model, PATIENCE if speculation is None else speculation.patience)
        self._opened: weakref.WeakKeyDictionary[TokenHistory, OpenHistory] = weakref.WeakKeyDictionary()
        self._opening = threading.RLock()  # a history may be dropped, by the collector, in a thread that holds it
        self._replying = threading.local()
        self._newest: ReplyClock | None = None

    @property
    def last_stats(self) -> GenerationStats | None:
        """Tokens and times of the newest reply; None before its prompt has been read."""
        return None if self._newest is None else self._newest.stats

    @property
    def is_replying(self) -> bool:
        """True within a reply of this thread."""
        return self._clock is not None

    @property
    def vocab_size(self) -> int:
        """V, the size of the vocabulary."""
        return self.model.config.vocab_size

    @contextmanager
    def reply(self) -> Iterator[None]:
        """One reply of this thread, whose tokens and times are counted."""
        outer = self._clock
        clock = self._replying.clock = self._newest = ReplyClock(self.model.max_seq_len)
        try:
            yield
        finally:
            clock.stop()
            self._replying.clock = outer

    def rescale(self, mode: str, **rope: Any) -> None:
        """As `Scheduler.rescale`."""
        self._scheduler.rescale(mode, **rope)

    def extend(self, history: TokenHistory, token_ids: list[int], keep: int) -> torch.Tensor:
        """Append tokens to a history and give the logits after the last `keep` of them, [keep, V] float32.

        Raises:
            RequestError: as `Model.forward`; cancelled. The history is then unchanged.
        """
        ids = checked_token_ids(token_ids, self.vocab_size)
        started = time.perf_counter()
        with torch.no_grad():
            opened = self._open(history, ids)
            logits, reused = opened.extend(history, ids, keep, self.progress, self.cancelled)
        if logits is None:
            raise _cancelled()
        history.extend_(ids)
        clock = self._clock
        if clock is not None and history.slot == MAIN:
            clock.count(history, keep, reused, time.perf_counter() - started, opened)
        return logits

    def loss(self, token_ids: list[int], labels: list[int]) -> torch.Tensor:
        """Mean of -log p(labels[i] | token_ids[:i]) over i >= 1, labels of -100 left out; NaN if none is left.

        Memory: logits in blocks of 64 MiB.

        Raises:
            RequestError: as `Model.forward`; a label that is not a token id; cancelled.
        """
        ids = checked_token_ids(token_ids, self.vocab_size)
        out_of_range = [label for label in labels if label != IGNORED_LABEL and not 0 <= label < self.vocab_size]
        if out_of_range:
            raise RequestError(f"labels must be token ids or {IGNORED_LABEL}, got {out_of_range[0]}")
        targets = torch.tensor([*labels[1:], IGNORED_LABEL])  # of each row
        with torch.no_grad(), self._scheduler.open(ids, self.adapters) as sequence:
            return self._mean_nll(sequence, ids, targets)

    def _mean_nll(self, sequence: Sequence, ids: list[int], targets: torch.Tensor) -> torch.Tensor:
        scored = (targets != IGNORED_LABEL).nonzero()
        first = int(scored[0]) if len(scored) else len(ids)
        self._read(sequence, ids[:first], "none", len(ids))
        block = max(1, min(self.model.max_input_len, LOGITS_BYTES // (4 * self.vocab_size)))
        total, count = 0.0, 0
        for start in range(first, len(ids), block):
            wanted = targets[start : start + block]
            mode = "all" if bool((wanted != IGNORED_LABEL).any()) else "none"
            logits = self._read(sequence, ids[start : start + block], mode, len(ids))  # [rows, V]
            if logits is None:
                continue
            wanted = wanted.to(logits.device)
            losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED_LABEL)
            chosen = losses[wanted != IGNORED_LABEL]
            total, count = total + float(chosen.double().sum()), count + len(chosen)
        return torch.tensor(total / count if count else float("nan"))

    def _read(self, sequence: Sequence, ids: list[int], mode: str, seq_len: int) -> torch.Tensor | None:
        if not ids:
            return None
        end = sequence.length + len(ids)
        logits = sequence.forward(ids, mode, self.progress, self.cancelled, seq_len)
        if sequence.length < end:
            raise _cancelled()
        return logits

    @property
    def _clock(self) -> ReplyClock | None:
        return getattr(self._replying, "clock", None)

    def _open(self, history: TokenHistory, ids: list[int]) -> OpenHistory:
        """The sequence of a history; another one if there is none, or if it cannot be continued."""
        key = self.model.adapter_key(self.adapters), self.model.layer_order
        with self._opening:
            opened = self._opened.get(history)
        if opened is None or opened.key != key:
            whole = history.token_ids + ids
            foresight = self._foresight(history, whole)
            opened = OpenHistory(self._scheduler, whole, self.adapters, key, foresight, self._shifts)
            with self._opening:
                self._opened[history] = opened
        return opened

    def _foresight(self, history: TokenHistory, token_ids: list[int]) -> Foresight | None:
        """Who guesses ahead for a history: in replies, and not in the second pass of guidance."""
        if self._speculation is None or not self.is_replying or history.slot != MAIN:
            return None
        return Foresight(self._speculation, token_ids, lambda: self.cancelled is not None and self.cancelled())


def _cancelled() -> RequestError:
    return RequestError("cancelled: the function given as `cancelled` returned True while tokens were read")
