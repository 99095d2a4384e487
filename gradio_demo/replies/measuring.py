"""A measurement as `Work`, followed like a reply: its progress, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ropewalk.engine.work import Work
from ropewalk.generate.generate import Cancelled, Progress

LOOK_S = 0.25

Measure = Callable[[Progress, Cancelled], Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement at one moment. result: what was measured, once it is over; error: why there is no result."""

    done: int = 0
    total: int = 0
    running: bool = True
    cancelled: bool = False
    result: Any = None
    error: str | None = None


class Measurement:
    """Runs `measure(progress, cancelled)` while it is followed."""

    def __init__(self, measure: Measure) -> None:
        self._work = Work(lambda work: measure(work.progress, work.is_cancelled), "measurement")

    def cancel(self) -> None:
        """End it soon, with the results so far."""
        self._work.cancel()

    def follow(self) -> Iterator[Measured]:
        """Views until the end; the last one has the result or the error. Leaving the iteration early cancels it.

        Raises:
            Exception: an unexpected error; those that ropewalk explains are in the last view.
        """
        yield from self._work.follow(self._measured, LOOK_S)

    def _measured(self, is_over: bool) -> Measured:
        work = self._work
        if not is_over:
            return Measured(*work.done_of)
        error = None if work.error is None else str(work.error)
        return Measured(*work.done_of, False, work.is_cancelled(), work.result, error)
