"""One step after another: who takes part, the model's step, what came of it. Knows nothing of threads.

begin new calls -> find whose pages others wait for -> admit to memory -> share out rows -> model.step -> results
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ropewalk.adapters.request import Request
from ropewalk.base.errors import CacheFullError
from ropewalk.generate.scheduler.call import Call
from ropewalk.generate.scheduler.plan import Reader, Want, find_leaders, plan_rows
from ropewalk.generate.scheduler.room import PagedModel, Room
from ropewalk.generate.scheduler.sequence import CacheLike, RotatingModel, SequenceState, StepShare
from ropewalk.generate.scheduler.timing import StepTimes
from ropewalk.model.step import RunningStep, Span
from ropewalk.model.work import TokenWork

Planned = list[tuple[Call, Span]]


class StepModel(PagedModel, RotatingModel, Protocol):
    """What a scheduler needs of a `model.Model`."""

    config: Any
    max_seq_len: int
    max_input_len: int
    work: TokenWork

    @property
    def steps_under_way(self) -> int: ...
    def begin_step(self, spans: Sequence[Span]) -> RunningStep: ...
    @property
    def adapters(self) -> tuple[str, ...]: ...

    def fork(self, cache: CacheLike) -> CacheLike: ...
    def rescale(self, *, mode: str, caches: Iterable[CacheLike] | None = None, **rope: Any) -> bool: ...
    def shift(self, cache: CacheLike, keep: int, drop: int) -> int: ...
    def adapter_key(self, adapters: Request | None) -> Any: ...
    def step(self, spans: Sequence[Span]) -> list[torch.Tensor | None] | None: ...
    def forward(
        self,
        token_ids: Sequence[int],
        cache: CacheLike,
        logits: str = "last",
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        seq_len: int | None = None,
        adapters: Request | None = None,
    ) -> torch.Tensor | None: ...


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a step computes, told before it does: then its calls are what they will no longer be."""

    of_prompts: int
    prompt_work: float
    num_replies: int

    @classmethod
    def of(cls, planned: Planned, work: TokenWork) -> StepRows:
        """Of the rows that are planned."""
        prompts = [span for call, span in planned if not call.is_reply]
        of_prompts = sum(len(span.token_ids) for span in prompts)
        return cls(of_prompts, sum(_work(work, span) for span in prompts), len(planned) - len(prompts))


class Steps:
    """Used by the thread that leads. num_steps, num_rows: so far."""

    def __init__(self, model: StepModel, patience: float) -> None:
        self.model = model
        self.room = Room(model)
        self.times = StepTimes(patience)
        self.num_steps = self.num_rows = 0

    def take_(
        self, calls: Sequence[Call], sequences: Mapping[int, SequenceState], mine: Call, free_: Callable[[], bool]
    ) -> bool:
        """One step for the open `sequences`, of which `calls` wait; False if none of them could compute.

        mine: the call of this thread, whose callbacks are called between layers if no other waits. free_: frees the
        pages of sequences that have ended meanwhile; True if there were any.
        """
        for call in calls:
            if call.is_new:
                call.begin_(self.model)
        going = [call for call in calls if not call.is_cancelled]
        going.sort(key=lambda call: call.sequence.importance)
        admitted = self.room.admit_(self._without_followers(going, sequences), sequences.values())
        planned = self._planned(admitted, sum(state.has_read for state in sequences.values()))
        alone = mine if len(calls) == 1 else None
        while planned:
            try:
                self._run(planned, alone)
                return True
            except CacheFullError as error:
                if free_():
                    continue
                if not self.room.yield_one_([call for call, _ in planned], sequences.values()):
                    planned[0][0].fail_(error)
                    return True
                planned = [(call, span) for call, span in planned if call.sequence.is_admitted]
        return False

    def finish_all_(self) -> None:
        """Until no step is under way: none is, where each ends before the next begins."""

    def computes(self, sequence: SequenceState) -> bool:
        """Whether a step under way writes to its pages."""
        return False

    def share_prompts_(self, calls: Sequence[Call]) -> None:
        """The prompts that these calls have read are for others from now on."""
        for call in calls:
            state = call.sequence
            if state.keep and call.error is None and call.start < len(state.prompt_ids) <= state.cache.length:
                self.model.share(state.cache)

    def _without_followers(self, calls: list[Call], sequences: Mapping[int, SequenceState]) -> list[Call]:
        """The calls that need not wait for pages which another one is computing."""
        leaders = find_leaders([_reader(call) for call in calls if call.can_attach])
        ready = []
        for call in calls:
            state, before = call.sequence, call.sequence.waits_for
            state.waits_for = leaders.get(state.number)
            if before is not None and state.waits_for is None:
                if before in sequences and sequences[before].cache.length:
                    self.model.share(sequences[before].cache)
                if state.is_admitted:  # else that happens when it is
                    self.room.attach_(call)
            if state.waits_for is None:
                ready.append(call)
        return ready

    def _planned(self, calls: Sequence[Call], num_replies: int) -> Planned:
        wants = [_want(call, self.model.work if num_replies else None) for call in calls]
        num_prompts = sum(not want.is_reply for want in wants)
        rows = plan_rows(wants, self.times.budget(num_replies, num_prompts, self.model.max_input_len))
        for call in calls:
            call.passed = 0 if call.sequence.number in rows else call.passed + 1
        return [(call, call.span(rows[call.sequence.number])) for call in calls if call.sequence.number in rows]

    def _run(self, planned: Planned, alone: Call | None) -> None:
        """Compute, and hand out the results. An error reaches the calls that it belongs to.

        Raises:
            CacheFullError: nothing was computed. BaseException: this thread was interrupted; all caches are as before.
        """
        lengths = [call.sequence.cache.length for call, _ in planned]
        made = [call.sequence.cache.segments for call, _ in planned]
        rows, started = StepRows.of(planned, self.model.work), time.perf_counter()
        try:
            results = self._step([span for _, span in planned], alone)
        except BaseException as error:
            for (call, _), length, segments in zip(planned, lengths, made, strict=True):
                call.sequence.go_back_(length, segments)
            if isinstance(error, CacheFullError) or not isinstance(error, Exception):
                raise
            self._run_singly(planned, error)
            return
        if results is None:  # cancelled: the caches hold what is complete
            planned[0][0].stop_()
            return
        self._hand_results_(planned, results, rows, time.perf_counter() - started)

    def _hand_results_(
        self, planned: Planned, results: Sequence[torch.Tensor | None], rows: StepRows, seconds: float
    ) -> None:
        """What a step has computed, to the calls that took part in it."""
        self.times.record(rows.prompt_work, seconds)
        self.num_steps += 1
        self.num_rows += sum(len(span.token_ids) for _, span in planned)
        for (call, _), logits in zip(planned, results, strict=True):
            call.sequence.last_step = StepShare(seconds, max(rows.num_replies - 1, 0), rows.of_prompts)
            self._take_(call, logits)

    def _take_(self, call: Call, logits: torch.Tensor | None) -> None:
        """A span of it has been computed. What its owner wants a copy of is copied now: later its pages may be gone."""
        call.take_(logits)
        state = call.sequence
        if state.copies and state.copy is None and state.cache.length >= len(state.prompt_ids):
            state.copy = self.model.fork(state.cache)

    def _run_singly(self, planned: Planned, error: Exception) -> None:
        """A step has failed: find out for whom, and compute the others."""
        if len(planned) == 1:
            planned[0][0].fail_(error)
            return
        for call, span in planned:
            length = call.sequence.cache.length
            try:
                self._take_(call, self._step([span], None)[0])
            except CacheFullError:
                continue  # it is in the next step, which makes room
            except Exception as its_own:
                call.sequence.trim_(length)
                call.fail_(its_own)

    def _step(self, spans: list[Span], alone: Call | None) -> list[torch.Tensor | None] | None:
        """`Model.step`; None once cancelled. Messages about a single span need not say which one."""
        if len(spans) > 1:
            return self.model.step(spans)
        end = spans[0].cache.length + len(spans[0].token_ids)
        watched = {} if alone is None else _watched(alone)
        only = spans[0]
        logits = self.model.forward(
            only.token_ids, only.cache, only.logits, seq_len=only.seq_len, adapters=only.adapters, **watched
        )
        return [logits] if only.cache.length == end else None


def _watched(alone: Call) -> dict[str, Callable[..., Any]]:
    """The callbacks of a call that is alone, as arguments of `Model.forward`."""
    watched: dict[str, Callable[..., Any]] = {}
    before, is_repeated = alone.rows_done, alone.sequence.cache.length < alone.sequence.computed
    if alone.progress is not None and not is_repeated:
        watched["progress"] = lambda done, total: alone.report_progress(before + done)
    if alone.cancelled is not None:
        watched["cancelled"] = alone.asks_to_stop
    return watched


def _want(call: Call, work: TokenWork | None) -> Want:
    """work: None where rows count alike, because nobody waits meanwhile."""
    state = call.sequence
    row_work = 1.0 if work is None else work.beside_first(state.cache.length)
    return Want(state.number, call.rows_left, call.is_reply, state.client, state.priority, call.passed, row_work)


def _work(work: TokenWork, span: Span) -> float:
    rows = len(span.token_ids)
    return rows * work.beside_first(span.cache.length + rows / 2)


def _reader(call: Call) -> Reader:
    state = call.sequence
    origin = (state.adapter_key, call.rotation)
    return Reader(state.number, call.all_ids, state.cache.length, origin, state.priority)
