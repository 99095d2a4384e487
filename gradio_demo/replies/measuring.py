"""A measurement in a thread of its own, with progress and cancellation, followed like a reply."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ropewalk.base.errors import RopewalkError
from ropewalk.generate.generate import Cancelled, Progress

LOOK_S = 0.25

Work = Callable[[Progress, Cancelled], Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement at one moment. result: what the work returned, once it has; error: why it could not."""

    done: int = 0
    total: int = 0
    running: bool = True
    cancelled: bool = False
    result: Any = None
    error: str | None = None


class Measurement:
    """Runs `work(progress, cancelled)` while it is followed."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._cancelled = threading.Event()
        self._at = (0, 0)
        self._result: Any = None
        self._error: str | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="measurement", daemon=True)

    def cancel(self) -> None:
        """End it soon, with the results so far."""
        self._cancelled.set()

    def follow(self) -> Iterator[Measured]:
        """Until the end; the last one has the result or the error. Leaving the iteration early cancels it.

        Raises:
            Exception: whatever went wrong apart from errors that are explained.
        """
        self._thread.start()
        try:
            while self._thread.is_alive():
                yield Measured(*self._at)
                self._thread.join(LOOK_S)
            if self._failure is not None:
                raise self._failure
            yield Measured(*self._at, False, self._cancelled.is_set(), self._result, self._error)
        finally:
            self.cancel()

    def _run(self) -> None:
        try:
            self._result = self._work(self._progress, self._cancelled.is_set)
        except RopewalkError as error:
            self._error = str(error)
        except Exception as error:  # handed to the follower
            self._failure = error

    def _progress(self, done: int, total: int) -> None:
        self._at = (done, total)
