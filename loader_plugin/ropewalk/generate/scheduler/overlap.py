"""Steps that overlap, for a model whose layers run in several processes: while one has a step, another has the next.

    rank 0   A B . A B . A B        A, B: half of the replies each; a token of A needs the one before it,
    rank 1   . A B . A B . A        so with all replies in one step each rank would wait for the other

The replies are shared out among as many steps as there are ranks. One thread begins them and finishes them in turn;
prompts go along as they do in single steps. Whatever changes pages of sequences other than by computing (admission,
pre-emption, errands between steps) waits until no step is under way: that happens once a request, not once a token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ropewalk.base.errors import CacheFullError
from ropewalk.generate.scheduler.call import Call
from ropewalk.generate.scheduler.sequence import SequenceState
from ropewalk.generate.scheduler.steps import Planned, StepModel, StepRows, Steps
from ropewalk.model.step import RunningStep

ADMITTED_EVERY = 8  # steps until it is asked again whether sequences that wait for pages can have them


def steps_for(model: StepModel, patience: float) -> Steps:
    """Steps one after the other, or overlapping ones where the model gains by them."""
    return Steps(model, patience) if model.steps_under_way == 1 else OverlappingSteps(model, patience)


@dataclass(frozen=True, slots=True, eq=False)
class UnderWay:
    """A step that has begun. lengths, made: of the caches before it."""

    planned: Planned
    lengths: list[int]
    made: list
    rows: StepRows
    started: float
    running: RunningStep


class OverlappingSteps(Steps):
    """Used by the thread that leads; what it has begun may be finished by the next that leads."""

    def __init__(self, model: StepModel, patience: float) -> None:
        super().__init__(model, patience)
        self._under_way: deque[UnderWay] = deque()
        self._since_admission = 0  # steps

    def take_(
        self, calls: Sequence[Call], sequences: Mapping[int, SequenceState], mine: Call, free_: Callable[[], bool]
    ) -> bool:
        """Begin a step, or finish the one that began first; False if neither could be done.

        One call that is alone is computed at once, so that its callbacks are called between layers.
        """
        ready = [call for call in calls if not call.is_under_way]
        if not self._under_way and len(calls) == 1:
            return super().take_(calls, sequences, mine, free_)
        ready = self._after_admission_(ready)
        begun = self._begin(ready, sequences) if ready else False
        others = sum(not call.is_under_way for call in calls)
        if self._under_way and (not begun or not others or len(self._under_way) >= self.model.steps_under_way):
            self._finish_()
            return True
        if begun or self._under_way:
            return True
        return super().take_(ready, sequences, mine, free_)  # pages are missing, and no step is under way

    def _after_admission_(self, ready: Sequence[Call]) -> Sequence[Call]:
        """The calls that may take part: those that hold pages already, and from time to time all others, for which
        everything under way is finished, since they may have to be given the pages of somebody else."""
        outside = [call for call in ready if not call.sequence.is_admitted]
        if outside and (any(call.is_new for call in outside) or self._since_admission >= ADMITTED_EVERY):
            self.finish_all_()
            self._since_admission = 0
        elif outside and self._under_way:
            return [call for call in ready if call.sequence.is_admitted]
        return ready

    def finish_all_(self) -> None:
        """Until no step is under way."""
        while self._under_way:
            self._finish_()

    def computes(self, sequence: SequenceState) -> bool:
        """Whether a step under way writes to its pages."""
        return any(call.sequence is sequence for step in self._under_way for call, _ in step.planned)

    def _begin(self, ready: Sequence[Call], sequences: Mapping[int, SequenceState]) -> bool:
        for call in ready:
            if call.is_new:
                call.begin_(self.model)
        going = [call for call in ready if not call.is_cancelled and not call.is_done]
        going.sort(key=lambda call: call.sequence.importance)
        admitted = self.room.admit_(self._without_followers(going, sequences), sequences.values())
        num_replies = sum(state.has_read for state in sequences.values())
        planned = self._planned(self._share_of(admitted, num_replies), num_replies)
        return bool(planned) and self._send(planned)

    def _share_of(self, calls: Sequence[Call], num_replies: int) -> list[Call]:
        """As many replies as are in each step if all have alike; prompts as they come."""
        most = -(-num_replies // self.model.steps_under_way)
        replies = sorted((call for call in calls if call.is_reply), key=lambda call: call.sequence.called_s)[:most]
        return [call for call in calls if not call.is_reply or call in replies]

    def _send(self, planned: Planned) -> bool:
        """False if there are no pages for it."""
        lengths = [call.sequence.cache.length for call, _ in planned]
        made = [call.sequence.cache.segments for call, _ in planned]
        rows, started = StepRows.of(planned, self.model.work), time.perf_counter()
        try:
            running = self.model.begin_step([span for _, span in planned])
        except BaseException as error:
            self._go_back_(planned, lengths, made)
            if isinstance(error, CacheFullError):
                self.finish_all_()
                return False
            if not isinstance(error, Exception):
                raise
            self.finish_all_()
            self._run_singly(planned, error)
            return True
        for call, _ in planned:
            call.is_under_way = True
        self._under_way.append(UnderWay(planned, lengths, made, rows, started, running))
        return True

    def _finish_(self) -> None:
        """The step that began first: its results go to their calls."""
        step = self._under_way.popleft()
        self._since_admission += 1
        for call, _ in step.planned:
            call.is_under_way = False
        try:
            results = step.running.finish_()
        except BaseException as error:
            self._go_back_(step.planned, step.lengths, step.made)
            if not isinstance(error, Exception):
                raise
            self._run_singly(step.planned, error)
            return
        self._hand_results_(step.planned, results, step.rows, time.perf_counter() - step.started)

    def _go_back_(self, planned: Planned, lengths: list[int], made: list) -> None:
        for (call, _), length, segments in zip(planned, lengths, made, strict=True):
            call.sequence.go_back_(length, segments)
