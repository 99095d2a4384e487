"""One call of `Sequence.forward`, from its begin to its end: what has been computed of it, and what comes next."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from functools import cached_property

import torch

from ropewalk.base.choices import RECOMPUTE
from ropewalk.generate.scheduler.sequence import Cancelled, Progress, RotatingModel, SequenceState
from ropewalk.model.step import Span

REPLY_ROWS = 32  # a call with more rows than this is planned like a prompt, whatever it is


class Call:
    """Its owner's thread waits in it, or leads. The fields are changed by the thread that leads, but for is_waiting,
    and is_cancelled, which the owner sets.

    start, end: its positions in the sequence. attached: how many of its tokens came from other sequences. passed: steps
    since it had rows.
    is_under_way: a step that has begun computes rows of it.
    is_done: nothing is left to compute; is_over: its owner may go on; is_left: its owner has gone, perhaps before that.
    has_news: its owner is to look.
    """

    def __init__(
        self,
        sequence: SequenceState,
        token_ids: list[int],
        logits: str,
        seq_len: int | None,
        progress: Progress | None,
        cancelled: Cancelled | None,
        lock: threading.RLock,
    ) -> None:
        self.sequence, self.token_ids, self.logits = sequence, token_ids, logits
        self.start = len(sequence.token_ids)
        self.end = self.start + len(token_ids)
        self.seq_len = max(self.end, seq_len or 0)  # once it has begun, what its frequencies are for
        self.progress, self.cancelled = progress, cancelled
        self.thread = threading.get_ident()
        self.ready = threading.Condition(lock)
        self.is_new = True
        self.rotation: Hashable = None
        self.is_under_way = False
        self.is_waiting = self.has_news = self.is_cancelled = self.is_done = self.is_over = self.is_left = False
        self.attached = self.passed = 0
        self.result: torch.Tensor | None = None
        self.error: Exception | None = None
        self._pieces: list[torch.Tensor] = []
        self._reported = 0

    @cached_property
    def all_ids(self) -> list[int]:
        """The tokens of the sequence before the call, and its own."""
        return self.sequence.token_ids[: self.start] + self.token_ids

    @property
    def has_callbacks(self) -> bool:
        """Whether its owner wants to be woken between steps."""
        return self.progress is not None or self.cancelled is not None

    @property
    def rows_left(self) -> int:
        """Rows before it is over, those to be computed again included."""
        return self.end - self.sequence.cache.length

    @property
    def rows_done(self) -> int:
        """Of its tokens, those computed so far, by this sequence."""
        return max(self.sequence.computed - self.start - self.attached, 0)

    @property
    def is_reply(self) -> bool:
        """True for the next tokens of a reply whose pages are all there: few rows, which are not shared out."""
        return self.sequence.has_read and self.rows_left == len(self.token_ids) <= REPLY_ROWS

    @property
    def can_attach(self) -> bool:
        """Whether pages of others can stand for some of its rows: not where the logits of all are wanted."""
        return self.logits != "all" and self.sequence.computed <= self.sequence.cache.length < self.end - 1

    def begin_(self, model: RotatingModel) -> None:
        """The first look of a thread that leads.

        Here it is decided which frequencies the rows get, from the sequence alone: neither the rows that others have in
        the same steps nor pages that were given up change it. `rotation` is equal for calls whose keys are rotated in
        the same way.
        """
        sequence = self.sequence
        sequence.begin_(self.start)
        reach = sequence.reach
        self.seq_len = model.reach_of(reach, self.seq_len)
        self.rotation = model.frequencies(self.seq_len)
        if reach and model.rope_growth == RECOMPUTE and self.rotation != model.frequencies(reach):
            sequence.restart_(self.seq_len)
        self.is_new = False

    def span(self, rows: int) -> Span:
        """The next rows, at most so many, and not both rows that are new and rows that are computed again."""
        sequence, start = self.sequence, self.sequence.cache.length
        if start < sequence.computed:
            end, seq_len = next((end, seq_len) for _, end, seq_len in sequence.made if end > start)
            return self._span(start, min(start + rows, end), "none", seq_len)
        end = min(start + rows, self.end)
        return self._span(start, end, "none" if self.logits == "last" and end < self.end else self.logits, self.seq_len)

    def whole_span(self) -> Span:
        """All rows that are left, to ask what memory they take."""
        return self._span(self.sequence.cache.length, self.end, "none", self.seq_len)

    def take_(self, logits: torch.Tensor | None) -> None:
        """A span of it has been computed."""
        self.sequence.computed = max(self.sequence.computed, self.sequence.cache.length)
        if logits is not None:
            self._pieces.append(logits)
        if self.sequence.cache.length >= self.end:
            self.result = self._whole_logits()
            self.is_done = True

    def fail_(self, error: Exception) -> None:
        """It ends with an error, for its owner alone."""
        self.error = error
        self.is_done = True

    def stop_(self) -> None:
        """The model was asked to stop; what it had completed counts."""
        self.sequence.computed = max(self.sequence.computed, self.sequence.cache.length)
        self.is_cancelled = True

    def finish_(self) -> None:
        """It is over; the sequence keeps the tokens that were computed."""
        self.sequence.token_ids += self.token_ids[: max(self.sequence.computed - self.start, 0)]
        self.is_over = True

    def report(self) -> None:
        """Call the owner's callbacks, in its own thread."""
        self.report_progress(self.rows_done)
        if not self.is_over and self.asks_to_stop():
            self.is_cancelled = True

    def report_progress(self, rows_done: int) -> None:
        """Tell the owner, if there is something new."""
        if self.progress is not None and rows_done > self._reported:
            self._reported = rows_done
            self.progress(rows_done, len(self.token_ids) - self.attached)

    def asks_to_stop(self) -> bool:
        """Whether the owner wants no more of it."""
        return self.cancelled is not None and self.cancelled()

    def _span(self, start: int, end: int, logits: str, seq_len: int) -> Span:
        is_new = start >= self.start  # then without a copy of a long sequence at every token
        ids = self.token_ids[start - self.start : end - self.start] if is_new else self.all_ids[start:end]
        return Span(ids, self.sequence.cache, logits, self.sequence.adapters, seq_len)

    def _whole_logits(self) -> torch.Tensor | None:
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces)]
        return self._pieces[0] if self._pieces else None
