"""A sequence of tokens: what its owner sees of it, and what its scheduler knows.

What a sequence *is* are its token ids. Its pages are what happens to be computed of them at the moment: they come from
other sequences, and go when memory is short. `made` then says how to compute them again to the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ropewalk.adapters.request import Request
from ropewalk.base.errors import RequestError
from ropewalk.generate.scheduler.plan import importance
from ropewalk.model.token_ids import checked_token_ids

if TYPE_CHECKING:
    from ropewalk.generate.scheduler.call import Call

Progress = Callable[[int, int], None]
Cancelled = Callable[[], bool]
Segment = tuple[int, int, int]  # (start, end, seq_len): positions computed as rows of a sequence of length seq_len


class RotatingModel(Protocol):
    """What is needed of a model to know which frequencies a sequence gets."""

    rope_growth: str

    def frequencies(self, seq_len: int) -> Hashable: ...
    def reach_of(self, reach: int, length: int) -> int: ...


class CacheLike(Protocol):
    """What a sequence needs of a `cache.KvCache`."""

    @property
    def length(self) -> int: ...
    @property
    def reach(self) -> int: ...
    @property
    def is_ahead(self) -> bool: ...
    @property
    def was_moved(self) -> bool: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def segments(self) -> list[Segment]: ...
    def continuable(self, length: int) -> int: ...
    def truncate(self, length: int) -> None: ...


class Runs(Protocol):
    """What a sequence needs of its scheduler."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def max_input_len(self) -> int: ...
    @property
    def source(self) -> str: ...
    def run(
        self,
        sequence: SequenceState,
        token_ids: list[int],
        logits: str,
        seq_len: int | None,
        progress: Progress | None,
        cancelled: Cancelled | None,
    ) -> torch.Tensor | None: ...
    def rotates_alike(self, sequence: SequenceState, first_len: int, last_len: int) -> bool: ...
    def shift(self, sequence: SequenceState, keep: int, drop: int) -> int: ...


class Sequence:
    """The tokens of one reply, and the right to have them computed. Made by `Scheduler.open`; for one thread at a time.

    prompt_ids: what it was opened for. source: the model, for messages.
    """

    def __init__(self, scheduler: Runs, state: SequenceState) -> None:
        self._scheduler, self._state = scheduler, state
        self.prompt_ids = list(state.prompt_ids)
        self.vocab_size = scheduler.vocab_size
        self.max_input_len, self.source = scheduler.max_input_len, scheduler.source

    @property
    def capacity(self) -> int:
        """The most tokens that it can have."""
        return self._scheduler.capacity

    @property
    def length(self) -> int:
        """The number of its tokens."""
        return len(self._state.token_ids)

    @property
    def token_ids(self) -> list[int]:
        """A copy of its tokens."""
        return list(self._state.token_ids)

    @property
    def reused(self) -> int:
        """How many of its tokens did not have to be computed, because others had done it."""
        return self._state.reused

    @property
    def copy(self) -> CacheLike | None:
        """A cache of its own with the prompt, if the sequence was opened for that and the prompt has been read."""
        return self._state.copy

    @property
    def shifted(self) -> int:
        """How many of its positions were moved to where they are, instead of being computed there."""
        return self._state.shifted

    @property
    def is_closed(self) -> bool:
        """True once nothing more can be computed."""
        return self._state.is_closed

    @property
    def last_step(self) -> StepShare:
        """The step that finished the last call."""
        return self._state.last_step

    def forward(
        self,
        token_ids: Items[int],
        logits: str = "last",
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        seq_len: int | None = None,
    ) -> torch.Tensor | None:
        """Append tokens and compute their logits, in steps that are shared with other sequences.

        Arguments and results are those of `Model.forward`; both callbacks are called in this thread, between steps, and
        for a sequence that is alone between layers. progress speaks of the tokens that nobody had computed before.
        Cancelled, it returns None and keeps the tokens that were computed.

        Raises:
            RequestError: as `Model.forward`. CacheFullError: the pool cannot hold even this sequence alone.
        """
        self._check_open()
        ids = checked_token_ids(token_ids, self.vocab_size)
        needed = self.length + len(ids)
        if needed > self.capacity:
            raise RequestError(
                f"{len(ids)} tokens do not fit: the sequence has {self.length} of at most {self.capacity} positions, "
                f"{needed} are needed; shorten it, or load the model with a max_seq_len of at least {needed}"
            )
        return self._scheduler.run(self._state, ids, logits, seq_len, progress, cancelled)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on.

        Raises:
            RequestError: it does not have that many.
        """
        self._check_open()
        if not 0 <= length <= self.length:
            raise RequestError(f"cannot truncate to {length!r}: the sequence has {self.length} tokens (0 empties it)")
        del self._state.token_ids[length:]  # of pages, the thread that leads takes care

    def shift(self, keep: int, drop: int) -> int:
        """Take `drop` tokens out, from `keep` on; the rest moves down and is not computed again, if it can be helped.

        Returns how many tokens moved without being computed again: none if the pages were given up meanwhile.

        Raises:
            RequestError: it does not have these tokens. CacheFullError: as `Model.shift`.
        """
        self._check_open()
        if keep < 0 or drop < 0 or keep + drop > self.length:
            raise RequestError(f"cannot take {drop} tokens out from {keep} on: the sequence has {self.length} tokens")
        return self._scheduler.shift(self._state, keep, drop)

    def rotates_alike(self, first_len: int, last_len: int) -> bool:
        """Whether calls that reach these lengths next, and all between, rotate keys in the same way."""
        return self._scheduler.rotates_alike(self._state, first_len, last_len)

    def _check_open(self) -> None:
        if self._state.is_closed:
            raise RequestError("this sequence is closed: open another one")


@dataclass(frozen=True, slots=True)
class StepShare:
    """A step as one sequence saw it. seconds: of the model; num_others: further replies in it; prompt_rows: in it."""

    seconds: float
    num_others: int
    prompt_rows: int


class SequenceState:
    """What the scheduler knows of a sequence. Only the thread that leads changes it, but token_ids are its owner's
    between calls.

    shifts: what was computed of an older prompt, of which a stretch is missing now, may be moved down for this one.
    number: its age. thread, called_s: who called last, and when. is_admitted: it may have pages. computed: that many
    positions have been computed once; those that the cache does not hold now can be computed again from `made`. keep:
    its pages are for others, too, when it ends. copies: its owner wants a copy of the cache once the prompt is read.
    waits_for: the number of the sequence whose pages it waits for.
    """

    def __init__(
        self,
        number: int,
        cache: CacheLike,
        prompt_ids: Items[int],
        adapters: Request | None,
        adapter_key: Hashable,
        client: Hashable,
        priority: str,
        keep: bool,
        copies: bool = False,
        shifts: bool = False,
    ) -> None:
        self.number, self.cache, self.prompt_ids = number, cache, list(prompt_ids)
        self.adapters, self.adapter_key = adapters, adapter_key
        self.client, self.priority, self.keep = client, priority, keep
        self.copies, self.shifts = copies, shifts
        self.copy: CacheLike | None = None
        self.token_ids: list[int] = []
        self.call: Call | None = None
        self.thread = threading.get_ident()
        self.called_s = 0.0
        self.is_admitted = self.is_closed = False
        self.computed = self.reused = self.shifted = 0
        self.made: list[Segment] = []
        self.waits_for: int | None = None
        self.last_step = StepShare(0.0, 0, 0)

    @property
    def importance(self) -> tuple[int, int]:
        """A key to sort by: the most important first."""
        return importance(self.priority, self.number)

    @property
    def has_read(self) -> bool:
        """True once its prompt has been read."""
        return len(self.token_ids) >= len(self.prompt_ids)

    @property
    def num_known(self) -> int:
        """Its tokens, those of its call included."""
        return len(self.token_ids) if self.call is None else self.call.end

    @property
    def reach(self) -> int:
        """The length that the frequencies of its keys are for; 0 if it has none."""
        return max(self.cache.reach, max((seq_len for _, _, seq_len in self.made), default=0))

    def trim_(self, length: int) -> None:
        """Let the cache hold no more than this; nothing, if it could not go on from there."""
        if self.cache.length <= length:
            return
        kept = self.cache.continuable(length)
        if kept < length:
            self.remember_()
        self.cache.truncate(kept)

    def begin_(self, length: int) -> None:
        """A call begins: what was computed beyond the tokens that it follows does not count any more."""
        self.trim_(length)
        if self.cache.is_ahead:  # pages that were given up could not be computed again like this
            self.remember_()
            self.trim_(0)
        self.computed = min(self.computed, length)
        self.made = [(start, min(end, length), seq_len) for start, end, seq_len in self.made if start < length]

    def go_back_(self, length: int, segments: list[Segment]) -> None:
        """A step has failed, before which the cache held this. It has lost it if its keys were just being turned."""
        self.trim_(length)
        if self.cache.length < length:
            rest = [(max(start, length), end, seq_len) for start, end, seq_len in self.made if end > length]
            self.made = [*segments, *rest]

    def restart_(self, seq_len: int) -> None:
        """All that was computed is to be computed again, for another length."""
        self.made = [(0, self.computed, seq_len)] if self.computed else []
        self.trim_(0)

    def shift_(self, keep: int, drop: int) -> None:
        """A stretch of its tokens is gone; what the cache does not hold of the others is to be computed again."""
        del self.token_ids[keep : keep + drop]
        length = len(self.token_ids)
        self.made = [(0, length, max(self.reach - drop, length))] if self.cache.length < length else []
        self.computed = length

    def remember_(self) -> None:
        """Keep how the pages were computed, before they go."""
        length = self.cache.length
        rest = [(max(start, length), end, seq_len) for start, end, seq_len in self.made if end > length]
        self.made = [*self.cache.segments, *rest]
