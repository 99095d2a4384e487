"""Whose keys and values are in memory: sequences are admitted to it, and make room for more important ones.

A sequence is admitted when the pages of its whole call can be had, counting what could be evicted from the tree of
prefixes. If they cannot, less important sequences give theirs up; if those do not suffice, it waits, and so does
everybody behind it, or short prompts would keep a long one out for ever. Importance is an order of all sequences
(interactive before batch, older before younger), so two never evict each other in turn: the most important one that
wants to compute always can.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from ropewalk.adapters.request import Request
from ropewalk.generate.scheduler.call import Call
from ropewalk.generate.scheduler.plan import PAGE_ROWS
from ropewalk.generate.scheduler.sequence import CacheLike, SequenceState
from ropewalk.model.step import Span

IDLE_S = 1.0  # a sequence that asked for nothing this long gives its pages up to any other that can go on


class PagedModel(Protocol):
    """What is needed of a model here."""

    def accepts(self, cache: CacheLike) -> bool: ...
    def share(self, cache: CacheLike) -> None: ...
    def attach(
        self,
        cache: CacheLike,
        token_ids: Sequence[int],
        adapters: Request | None = None,
        seq_len: int | None = None,
    ) -> int: ...
    def missing_bytes(self, spans: Sequence[Span]) -> int: ...
    def new_cache(self) -> CacheLike: ...
    def keep(self, cache: CacheLike, client: Hashable = None) -> None: ...
    def resume(
        self,
        cache: CacheLike,
        token_ids: Sequence[int],
        adapters: Request | None = None,
        client: Hashable = None,
        shifts: bool = False,
    ) -> int: ...


class Room:
    """Used by the thread that leads, between steps. num_preempted: how often a sequence had to give its pages up."""

    def __init__(self, model: PagedModel) -> None:
        self._model = model
        self.num_preempted = 0

    def admit_(self, calls: Sequence[Call], sequences: Iterable[SequenceState]) -> list[Call]:
        """Those of the calls, given the most important first, that may compute now."""
        holders = list(sequences)
        admitted = [call for call in calls if call.sequence.is_admitted]
        for call in calls:
            if call.sequence.is_admitted:
                continue
            try:
                fits = self._make_room_(call, admitted, [other for other in holders if other.cache.length])
            except Exception as error:  # what is wrong with one call is no matter of the others
                call.fail_(error)
                continue
            if not fits:
                break
            call.sequence.is_admitted = True
            admitted = [other for other in admitted if other.sequence.is_admitted] + [call]
        return admitted

    def attach_(self, call: Call) -> None:
        """Take what others have computed, for rows that are new and for those that are to be computed again."""
        sequence = call.sequence
        if sequence.cache.length < sequence.computed:
            for _, end, seq_len in sequence.made:
                if end > sequence.cache.length + 1:
                    self._model.attach(sequence.cache, call.all_ids[:end], sequence.adapters, seq_len)
                if sequence.cache.length < end:
                    return
        if call.can_attach:
            before = sequence.cache.length
            self._model.attach(sequence.cache, call.all_ids, sequence.adapters, call.seq_len)
            if sequence.keep and not call.start and not sequence.shifted:
                sequence.shifted = self._model.resume(
                    sequence.cache, call.all_ids, sequence.adapters, sequence.client, sequence.shifts
                )
            found = sequence.cache.length - before
            call.attached += found
            sequence.reused += found
            sequence.computed = sequence.cache.length

    def yield_one_(self, calls: Sequence[Call], sequences: Iterable[SequenceState]) -> bool:
        """Pages are missing for a step with these calls: the least important sequence gives up its own.

        False if there is but one: nothing more can be done for it.
        """
        holders = {call.sequence.number: call.sequence for call in calls}
        holders |= {sequence.number: sequence for sequence in sequences if sequence.cache.length}
        if len(holders) == 1:
            return False
        self.preempt_(max(holders.values(), key=lambda sequence: sequence.importance))
        return True

    def preempt_(self, sequence: SequenceState) -> None:
        """Its pages go, first to the tree, where some may survive until it comes back."""
        call = sequence.call
        sequence.trim_(len(sequence.token_ids) if call is None or call.is_new else call.end)
        sequence.remember_()
        sequence.trim_(sequence.cache.length // PAGE_ROWS * PAGE_ROWS)  # the tree would have to copy a part of a page
        self._share(sequence)
        sequence.trim_(0)
        sequence.is_admitted = False
        self.num_preempted += 1

    def retire_(self, sequence: SequenceState) -> None:
        """It has ended: its pages are for others now."""
        sequence.trim_(len(sequence.token_ids))
        self._share(sequence)
        if sequence.keep and sequence.cache.length and self._model.accepts(sequence.cache):
            self._model.keep(sequence.cache, sequence.client)
        else:
            sequence.trim_(0)

    def _share(self, sequence: SequenceState) -> None:
        """What it holds is for others, too; not if the model's layer order has been changed meanwhile."""
        if sequence.keep and sequence.cache.length and self._model.accepts(sequence.cache):
            self._model.share(sequence.cache)

    def _make_room_(self, call: Call, admitted: Sequence[Call], holders: Sequence[SequenceState]) -> bool:
        """Whether the call can be admitted beside those that are; pre-empts others if that helps."""
        sequence = call.sequence
        before = sequence.computed, sequence.reused, call.attached, sequence.shifted
        self.attach_(call)
        if self._fits_(call, admitted, [other for other in holders if other is not sequence]):
            return True
        if sequence.cache.was_moved:  # there is no other
            self._model.keep(sequence.cache, sequence.client)
            sequence.cache = self._model.new_cache()
        sequence.trim_(0)  # what it attached to can be evicted for others meanwhile
        sequence.computed, sequence.reused, call.attached, sequence.shifted = before
        return False

    def _fits_(self, call: Call, admitted: Sequence[Call], others: Sequence[SequenceState]) -> bool:
        missing = self._missing(call, admitted)
        if not missing:
            return True
        mine = call.sequence.importance
        victims = sorted((other for other in others if other.importance > mine), key=_last_first)
        if not admitted:  # nobody else could go on, so those that ask for nothing must yield, too
            idle = [other for other in others if other.importance < mine]
            if not all(_is_idle(other, call.thread) for other in idle):
                return False
            victims += sorted(idle, key=_last_first)
        elif missing > sum(victim.cache.num_bytes for victim in victims):
            return False
        for victim in victims:
            self.preempt_(victim)
            if not self._missing(call, admitted):
                return True
        return not admitted

    def _missing(self, call: Call, admitted: Sequence[Call]) -> int:
        spans = [other.whole_span() for other in admitted if other.sequence.is_admitted]
        return self._model.missing_bytes([*spans, call.whole_span()])


def _last_first(sequence: SequenceState) -> tuple[int, int]:
    priority, number = sequence.importance
    return -priority, -number


def _is_idle(sequence: SequenceState, waiting: int) -> bool:
    """Whether it will not ask soon: it has not for a while, or its thread waits for another sequence."""
    if sequence.call is not None:
        return False
    return sequence.thread == waiting or time.monotonic() - sequence.called_s > IDLE_S
