"""Many threads call, one model computes: the rows of all who wait share its steps.

There is no thread behind this. Of the threads that wait, one *leads*: it computes steps for all of them until its own
call is over, and then another leads. Only the thread that leads touches the model, its caches and its pages, so the
model sees one thread at a time; the lock is held for bookkeeping alone, never while something is computed.

    forward: join -> [ somebody leads: wait | nobody does: lead until mine is over ] -> leave, and wake the next

A thread that leaves, be it because of an error or of Ctrl-C, steps down in any case; a call that is left early is
forgotten, and its sequence keeps the tokens that it had.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from ropewalk.adapters.request import Request
from ropewalk.base.choices import RECOMPUTE, RESCALE_MODE
from ropewalk.base.errors import RequestError
from ropewalk.base.memory import FreedMemory
from ropewalk.generate.prompt import checked_prompt
from ropewalk.generate.scheduler.call import Call
from ropewalk.generate.scheduler.overlap import steps_for
from ropewalk.generate.scheduler.plan import INTERACTIVE, check_client, check_priority
from ropewalk.generate.scheduler.sequence import Cancelled, Progress, SequenceState
from ropewalk.generate.scheduler.sequence import Sequence as OpenSequence
from ropewalk.generate.scheduler.steps import StepModel
from ropewalk.generate.scheduler.timing import PATIENCE

NOBODY_READY_S = 0.05  # until it is asked again whether somebody could go on
ERRAND_S = 0.05  # until who waits for an errand looks whether there is still somebody to run it
Result = TypeVar("Result")


class Errand(Generic[Result]):
    """Something to be done between steps, by the thread that leads. thread: whose errand it is."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self.thread = threading.get_ident()
        self.done = threading.Event()
        self._result: Result | None = None
        self._error: Exception | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has been run."""
        return self.done.is_set()

    def run(self) -> None:
        """Run it; an error is for the thread whose errand it is."""
        try:
            with torch.inference_mode():
                self._result = self._function()
        except Exception as error:
            self._error = error
        self.done.set()

    def outcome(self) -> Result:
        """What came of it, once it is done."""
        if self._error is not None:
            raise self._error
        return self._result


class Scheduler:
    """Runs the sequences of one model. All methods may be called from any thread. patience: see `StepTimes`."""

    def __init__(self, model: StepModel, patience: float = PATIENCE) -> None:
        self.model = model
        self.vocab_size = model.config.vocab_size
        self.max_input_len, self.source = model.max_input_len, str(model.config.source)
        # Reentrant, because a stream that is dropped may be closed by the garbage collector while its thread is here.
        self._lock = threading.RLock()
        self._steps = steps_for(model, patience)
        self._calls: list[Call] = []  # in the order of arrival
        self._sequences: dict[int, SequenceState] = {}  # those that are open, by number
        self._ended: deque[SequenceState] = deque()  # whose pages are still to be freed
        self._errands: deque[Errand] = deque()  # what is to be done between steps
        self._expected: set[SequenceState] = set()  # took part in the last step and have not asked again
        self._leader: Call | SequenceState | Errand | None = None
        self._gathering: Call | None = None  # of a leader that waits for the others
        self._stepped_s = 0.0
        self._num_opened = 0
        self._freed = FreedMemory()

    @property
    def capacity(self) -> int:
        """The most tokens of a sequence."""
        return self.model.max_seq_len

    @property
    def num_preempted(self) -> int:
        """How often a sequence had to give its pages up for another."""
        return self._steps.room.num_preempted

    @property
    def num_steps(self) -> int:
        """Steps of the model so far."""
        return self._steps.num_steps

    @property
    def num_rows(self) -> int:
        """Rows computed in these steps."""
        return self._steps.num_rows

    @contextmanager
    def open(
        self,
        prompt_ids: Sequence[int],
        adapters: Request | None = None,
        client: Hashable = None,
        priority: str = INTERACTIVE,
        keep: bool = True,
        copies: bool = False,
        shifts: bool = False,
    ) -> Iterator[OpenSequence]:
        """A sequence for a prompt and its reply; when the block ends, its pages are for others.

        client: who asks; clients share the rows for prompts fairly, and None is one of its own. keep: False if nobody
        is going to need the same tokens again. copies: the sequence is to have a `copy` of its prompt once it is read.
        shifts: the prompt may be that of an earlier sequence of the client without a stretch in the middle: what was
        computed after it is then moved down instead of computed again.

        Raises:
            RequestError: wrong token ids or client, unknown adapters or priority.
        """
        ids = checked_prompt(self.vocab_size, self.capacity, prompt_ids)
        key = self.model.adapter_key(adapters)
        check_priority(priority)
        check_client(client)
        cache = self.model.new_cache()
        with self._lock:
            self._num_opened += 1
            state = SequenceState(self._num_opened, cache, ids, adapters, key, client, priority, keep, copies, shifts)
            self._sequences[state.number] = state
        try:
            yield OpenSequence(self, state)
        finally:
            self._close(state)

    def rotates_alike(self, sequence: SequenceState, first_len: int, last_len: int) -> bool:
        """As `Sequence.rotates_alike`. Frequencies that follow the length never come back to those of a shorter one."""
        reaches = (self.model.reach_of(sequence.reach, length) for length in (first_len, last_len))
        first, last = (self.model.frequencies(reach) for reach in reaches)
        return first == last

    def shift(self, sequence: SequenceState, keep: int, drop: int) -> int:
        """As `Sequence.shift`, which has checked the arguments."""
        return self.between_steps(lambda: self._shifted(sequence, keep, drop))

    def rescale(self, mode: str = RESCALE_MODE.default, **rope: Any) -> None:
        """Another RoPE for the model and all its sequences, from the next step on; arguments as for `Model.rescale`.

        In mode "recompute" the sequences are computed anew by the steps to come, in turn with all others. In mode
        "rotate", what pages a sequence has to give up later is computed anew as well: there is no way back to turned
        keys.

        Raises:
            As `Model.rescale`; RequestError: a sequence is longer than the max_seq_len asked for. Nothing is changed.
        """
        self.between_steps(lambda: self._rescale(mode, rope))

    def between_steps(self, function: Callable[[], Result]) -> Result:
        """Run a function that changes the model or its caches, while no step does; its result, or its error.

        Raises:
            RequestError: called by a callback of a step, which would wait for itself.
        """
        errand = Errand(function)
        with self._lock:
            if self._leader is not None and self._leader.thread == errand.thread:
                raise RequestError("this cannot be done within a callback of a step: do it between the tokens")
            self._errands.append(errand)
        while not errand.is_done:
            with self._lock:
                leads = self._leader is None
                if leads:
                    self._leader = errand
            if leads:
                self._step_down(errand)
            else:
                errand.done.wait(ERRAND_S)  # its leader may be interrupted
        return errand.outcome()

    def run(
        self,
        sequence: SequenceState,
        token_ids: list[int],
        logits: str = "last",
        seq_len: int | None = None,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
    ) -> torch.Tensor | None:
        """As `Sequence.forward`, which has checked the arguments."""
        call = Call(sequence, token_ids, logits, seq_len, progress, cancelled, self._lock)
        try:
            self._join(call)
            while not call.is_over:
                if self._wait(call):
                    self._lead(call)
                else:
                    call.report()
        finally:
            self._leave(call)
        if call.error is not None:
            raise call.error
        call.report()
        return call.result

    def _join(self, call: Call) -> None:
        with self._lock:
            sequence = call.sequence
            sequence.call, sequence.thread, sequence.called_s = call, call.thread, time.monotonic()
            self._calls.append(call)
            self._expected.discard(sequence)
            self._tell_gathering()

    def _wait(self, call: Call) -> bool:
        """Until the call is over, or its owner is to look; True if this thread is to lead."""
        with self._lock:
            while not call.is_over and not call.has_news and self._leader is not None:
                call.is_waiting = True
                try:
                    call.ready.wait()
                finally:
                    call.is_waiting = False
            call.has_news = False
            if call.is_over or self._leader is not None:
                return False
            self._leader = call
            return True

    def _leave(self, call: Call) -> None:
        """The call is over, or its thread was interrupted; if this thread leads, another one is to do so now."""
        with self._lock:
            call.is_left = True
            self._forget(call)
            self._tell_gathering()
            leads = self._leader is call
            if self._leader is None:
                self._wake_next()
        if leads:
            self._step_down(call)

    def _close(self, sequence: SequenceState) -> None:
        with self._lock:
            sequence.is_closed, sequence.thread = True, threading.get_ident()
            self._sequences.pop(sequence.number, None)
            self._expected.discard(sequence)
            self._ended.append(sequence)
            self._tell_gathering()
            somebody_leads = self._leader is not None  # and frees the pages, between steps
            if not somebody_leads:
                self._leader = sequence
        if not somebody_leads:
            self._step_down(sequence)
        self._freed.return_if_due()

    def _lead(self, mine: Call) -> None:
        """Steps for all who wait, until this thread's call is over."""
        while not mine.is_over:
            self._tidy_up()
            with self._lock:
                self._gather(mine)
                self._hand_out([call for call in self._calls if call.is_cancelled])
                calls, sequences = list(self._calls), dict(self._sequences)
            if mine.is_over:
                break
            stepped = self._steps.take_(calls, sequences, mine, self._free_ended)
            with self._lock:
                self._stepped_s = time.perf_counter()
                over = self._hand_out(calls)
                if not stepped and not over:
                    self._wait_for_change(mine)
            self._steps.share_prompts_(over)
            if not mine.is_over:
                mine.report()

    def _gather(self, mine: Call) -> None:
        """Wait, briefly, for replies that took part in the last step: else they would miss every second one."""
        deadline = self._stepped_s + self._steps.times.patience_s
        try:
            self._gathering = mine
            while self._is_awaited():
                left_s = deadline - time.perf_counter()
                if left_s <= 0:
                    break
                mine.ready.wait(left_s)
        finally:
            self._gathering = None
            self._expected.clear()  # one that missed is not waited for until it asks again

    def _wait_for_change(self, mine: Call) -> None:
        """Nobody could compute: all pages are held by sequences that may ask again in a moment."""
        try:
            self._gathering = mine
            mine.ready.wait(NOBODY_READY_S)
        finally:
            self._gathering = None

    def _is_awaited(self) -> bool:
        """Whether a reply may ask in a moment: not if its thread waits here for another sequence."""
        waiting = {call.thread for call in self._calls}
        return any(sequence.thread not in waiting for sequence in list(self._expected))

    def _tell_gathering(self) -> None:
        if self._gathering is not None and not self._is_awaited():
            self._gathering.ready.notify()

    def _hand_out(self, calls: Sequence[Call]) -> list[Call]:
        """After a step: whose call is done may go on, who has callbacks is to look. Returns the calls that are over."""
        over = []
        for call in calls:
            if (call.is_done or call.is_cancelled and not call.is_under_way) and not call.is_left:
                call.finish_()
                over.append(call)
                self._forget(call)
                if call.result is not None and not call.sequence.is_closed:
                    self._expected.add(call.sequence)
            if call.is_over or call.has_callbacks:
                call.has_news = True
                if call.is_waiting:
                    call.ready.notify()
        return over

    def _forget(self, call: Call) -> None:
        if call in self._calls:
            self._calls.remove(call)
        if call.sequence.call is call:
            call.sequence.call = None

    def _step_down(self, leader: Call | SequenceState | Errand) -> None:
        try:
            while self._leader is leader:
                self._tidy_up()
                with self._lock:
                    if not self._ended and not self._errands:
                        self._leader = None
        finally:
            with self._lock:
                if self._leader is leader:  # interrupted; the next one that leads frees the rest
                    self._leader = None
                self._wake_next()

    def _wake_next(self) -> None:
        """The call that waits with the most rows leads next: a thread that leads for long saves changes."""
        waiting = [call for call in self._calls if call.is_waiting]
        if waiting and self._leader is None:
            max(waiting, key=lambda call: call.rows_left).ready.notify()

    def _tidy_up(self) -> None:
        """Only for the thread that leads: what is to be done between steps."""
        self._free_ended()
        if self._errands:
            self._steps.finish_all_()
        while self._errands:
            self._errands[0].run()
            self._errands.popleft()

    def _shifted(self, sequence: SequenceState, keep: int, drop: int) -> int:
        moved = 0
        sequence.trim_(len(sequence.token_ids))
        if sequence.cache.length == len(sequence.token_ids):
            try:
                moved = self.model.shift(sequence.cache, keep, drop)
            except RequestError:  # no memory for it, or a recent window that reaches too far back: read it again
                sequence.trim_(keep)
        else:
            sequence.trim_(keep)
        sequence.shift_(keep, drop)
        sequence.shifted += moved
        return moved

    def _rescale(self, mode: str, rope: dict[str, Any]) -> None:
        with self._lock:
            sequences = list(self._sequences.values())
        limit, longest = rope.get("max_seq_len"), max((state.num_known for state in sequences), default=0)
        if isinstance(limit, int) and limit < longest:
            raise RequestError(f"max_seq_len: {limit} is less than the {longest} tokens of a sequence that is open")
        self.model.rescale(mode=mode, caches=() if mode == RECOMPUTE else None, **rope)
        for state in sequences:
            if mode == RECOMPUTE:
                state.trim_(0)
                state.cache = self.model.new_cache()
            state.made = [(0, state.computed, state.computed)] if state.cache.length < state.computed else []

    def _free_ended(self) -> bool:
        """Only for the thread that leads. True if there was anything to free."""
        any_ended = bool(self._ended)
        if any(self._steps.computes(state) for state in self._ended):  # its thread was interrupted
            self._steps.finish_all_()
        while self._ended:
            self._steps.room.retire_(self._ended.popleft())
        return any_ended
