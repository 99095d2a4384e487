"""A history as the scheduler computes it: an open sequence that begins with its tokens."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from contextlib import ExitStack

import torch

from ropewalk.adapters.request import Request
from ropewalk.faces.hf.foresight import Foresight
from ropewalk.faces.hf.history import TokenHistory
from ropewalk.generate.scheduler.scheduler import Scheduler
from ropewalk.generate.scheduler.sequence import Cancelled, Progress


class OpenHistory:
    """The sequence of one history, from the call that opens it until the history is dropped.

    token_ids: what the first call will reach. key: a sequence is for one set of adapters and one layer order. shifts:
    as for `Scheduler.open`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        token_ids: list[int],
        adapters: Request | None,
        key: Hashable,
        foresight: Foresight | None = None,
        shifts: bool = False,
    ) -> None:
        self.key = key
        self._lock = threading.Lock()  # a sequence is for one thread at a time
        self._length = 0  # tokens that are known to be the history's
        self._foresight = foresight
        self._stack = ExitStack()
        if foresight is not None:
            self._stack.callback(foresight.close)
        self._sequence = self._stack.enter_context(scheduler.open(token_ids, adapters, shifts=shifts))

    def __del__(self) -> None:
        if hasattr(self, "_sequence") and self._sequence.length > self._length:
            self._sequence.truncate(self._length)  # what was guessed and never asked for is for nobody
        if hasattr(self, "_stack"):
            self._stack.close()

    @property
    def guessed(self) -> int:
        """Tokens guessed ahead."""
        return 0 if self._foresight is None else self._foresight.guessed

    @property
    def shifted(self) -> int:
        """Tokens that were moved down in the cache instead of being read again."""
        return self._sequence.shifted

    @property
    def accepted(self) -> int:
        """Of those, the ones that came true."""
        return 0 if self._foresight is None else self._foresight.accepted

    def extend(
        self,
        history: TokenHistory,
        token_ids: list[int],
        keep: int,
        progress: Progress | None,
        cancelled: Cancelled | None,
    ) -> tuple[torch.Tensor | None, int]:
        """(logits [keep, V] after the last tokens, tokens before which nothing had to be computed).

        None instead of logits once cancelled. keep: at most the number of `token_ids`.
        """
        with self._lock:
            ahead = self._known_ahead(history, token_ids, keep)
            if ahead is not None:
                return ahead, self._length - 1
            sequence = self._sequence
            sequence.truncate(min(sequence.length, len(history)))
            held, shared = sequence.length, sequence.reused
            rows = token_ids if held == len(history) else history.token_ids[held:] + token_ids
            logits = self._forward(rows, keep, len(history) + len(token_ids), progress, cancelled)
            if logits is not None:
                self._length = len(history) + len(token_ids)
            return logits, held + sequence.reused - shared

    def _known_ahead(self, history: TokenHistory, token_ids: list[int], keep: int) -> torch.Tensor | None:
        """The logits [1, V] after a token that was guessed, and computed with the one before it."""
        if self._foresight is None:
            return None
        logits = self._foresight.follow(self._sequence, len(history), token_ids, keep)
        if logits is not None:
            self._length += 1
        return logits

    def _forward(
        self,
        rows: list[int],
        keep: int,
        end: int,
        progress: Progress | None,
        cancelled: Cancelled | None,
    ) -> torch.Tensor | None:
        sequence, foresight = self._sequence, self._foresight
        guesses = foresight.guesses(sequence) if foresight is not None and len(rows) == keep == 1 else []
        if guesses:
            logits = sequence.forward([*rows, *guesses], "all", progress, cancelled)
            return None if logits is None else foresight.hold(guesses, logits)
        if 1 < keep < len(rows):
            read, rows = rows[:-keep], rows[-keep:]
            sequence.forward(read, "none", progress, cancelled, end)
            if sequence.length < end - keep:
                return None
        logits = sequence.forward(rows, "last" if keep == 1 else "all", progress, cancelled, end)
        if logits is not None and foresight is not None:
            foresight.read()
        return logits
